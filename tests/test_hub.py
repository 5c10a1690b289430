"""The hub is asked only for what its cache lacks, and each refusal has its own sentence: with a small hub, served here.

With huggingface_hub 2.4, `snapshot_download(local_files_only=True)` refuses what a download of chosen files left, so
the cache is looked into without it.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from drawing import ROOT
from safetensors.torch import load_file, save_file

FIRST, SECOND = "1" * 40, "2" * 40
NAME = "someone/tiny"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CODE = """
import sys
from noisecutmix.errors import InputError
from noisecutmix.sources import find_model
try:
    folder, variant, files = find_model(sys.argv[1], sys.argv[2] == "float16")
    print(folder.name, variant, len(files))
except InputError as error:
    print(error.as_line())
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves a folder as a repository. `mode` says how it behaves, `requests` lists the paths that were asked for."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.mode, self.commit, self.requests = root, "", FIRST, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        hub.requests.append(f"{self.command} {path}")
        if hub.mode == "silent":
            time.sleep(60)
        elif hub.mode:
            self.answer(401 if hub.mode == "RepoNotFound" else 403, b"{}", {"X-Error-Code": hub.mode})
        elif path.startswith(f"api/models/{NAME}"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", hub.commit):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            names = [file.relative_to(hub.root).as_posix() for file in sorted(hub.root.rglob("*")) if file.is_file()]
            about = {"id": NAME, "sha": hub.commit, "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                about = [{"type": "file", "path": n, "size": (hub.root / n).stat().st_size, "oid": "0"} for n in names]
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(f"{NAME}/resolve/"):
            content = (hub.root / path.split("/", 4)[4]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": hub.commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "repository")
    (tmp_path / "repository" / "README.md").write_text("A page that no script needs.")
    server = Hub(tmp_path / "repository")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def find(hub, tmp_path):
    """Find a model in a process of its own; return what it printed and the paths of the files that it fetched."""

    def run(model=NAME, precision="float32", **environment):
        hub.requests.clear()
        address = f"http://127.0.0.1:{hub.server_port}"
        places = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address}
        settings = {**os.environ, **places, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
        done = subprocess.run(
            [sys.executable, "-c", CODE, model, precision], env=settings, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def fetched(hub):
    return {request.split("/", 4)[4] for request in hub.requests if request.startswith(f"GET {NAME}/resolve/")}


def test_a_model_is_fetched_once_whatever_happens_to_its_repository(hub, find, tmp_path):
    assert find().startswith(f"{FIRST} None")
    weights = {name for name in fetched(hub) if name.endswith(".safetensors")}
    assert weights == {f"{part}/{name}.safetensors" for part, name in WEIGHTS.items()}
    assert "README.md" not in fetched(hub)
    for change in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert find(**change).startswith(f"{FIRST} None") and not hub.requests
    assert find(precision="float16").startswith(f"{FIRST} None")  # of the precision that is there
    hub.mode = "silent"
    assert find().startswith(f"{FIRST} None") and not hub.requests
    hub.mode, hub.commit = "", SECOND  # the repository has moved
    assert find().startswith(f"{FIRST} None") and find(f"{NAME}@{FIRST}").startswith(FIRST) and not hub.requests
    assert find(f"{NAME}@{SECOND}").startswith(SECOND) and hub.requests


@pytest.mark.parametrize(
    "lost",
    [
        "tokenizer",
        pytest.param("unet/diffusion_pytorch_model.safetensors", marks=pytest.mark.slow),
        pytest.param("vae/config.json", marks=pytest.mark.slow),
    ],
)
def test_only_what_is_missing_in_the_cache_is_fetched(hub, find, tmp_path, lost):
    if lost == "tokenizer":  # of one file, or of two with older versions of transformers
        is_old = (hub.root / "tokenizer" / "merges.txt").exists()
        lost = f"tokenizer/{'merges.txt' if is_old else 'tokenizer.json'}"
    find()
    (file,) = (tmp_path / "hf").rglob(f"snapshots/{FIRST}/{lost}")
    file.resolve().unlink()
    file.unlink(missing_ok=True)
    assert f"{NAME} is no local folder, is not complete in the hub's cache" in find(HF_HUB_OFFLINE="1")
    assert find().startswith(f"{FIRST} None")
    assert fetched(hub) == {lost}


def test_three_weight_files_of_one_precision_are_fetched(hub, find):
    for part, name in WEIGHTS.items():
        file = hub.root / part / f"{name}.safetensors"
        if part != "text_encoder":
            halves = {key: tensor.half() for key, tensor in load_file(file).items()}
            save_file(halves, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert find(precision="float16").startswith(f"{FIRST} None")  # the text encoder has no fp16
    assert sum(name.endswith(".safetensors") for name in fetched(hub)) == 3
    (hub.root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    hub.commit = SECOND
    message = find(f"{NAME}@{SECOND}")
    assert "(unet: float32 and fp16, vae: fp16, text_encoder: float32)" in message and not fetched(hub)


@pytest.mark.parametrize(
    ("mode", "model", "message"),
    [
        ("GatedRepo", NAME, f"--model: {NAME} is gated: accept its conditions"),
        ("RepoNotFound", NAME, f"the hub has no {NAME}, or it is private"),
        ("", f"{NAME}@typo", f"--model: {NAME} has no revision 'typo' on the hub"),
        ("", "no/such:name", "cannot be downloaded"),
        pytest.param("silent", NAME, "cannot be downloaded", marks=pytest.mark.slow),
    ],
)
def test_each_refusal_has_its_own_sentence(hub, find, mode, model, message):
    hub.mode = mode
    found = find(model)
    assert message in found and "\n" not in found
