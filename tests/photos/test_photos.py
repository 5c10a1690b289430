"""Pictures as people have them: how they are listed, checked and opened for training."""

import io
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
from drawing import CLASS_NAMES, write_photos
from PIL import Image, ImageCms, PngImagePlugin

from noisecutmix.errors import InputError
from noisecutmix.photos import check_photos, find_photos
from noisecutmix.photos.folders import picture_suffixes
from noisecutmix.photos.opening import crop_square, open_photo

ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files, or needs rights for links")


def check(photos, resolution=None):
    return check_photos(photos.files, photos.labels, resolution)


@pytest.fixture
def root(tmp_path):
    """Nine pictures of three classes."""
    return write_photos(tmp_path / "birds")


# Listing


def test_labels_are_those_of_image_folder(tmp_path):
    """Labels follow the sorted names; pictures may lie at any depth; a note counts the other files."""
    write_photos(tmp_path, ["c", "B", "a 10", "a 2"], count=1)
    (tmp_path / "c" / "deep" / "deeper").mkdir(parents=True)
    shutil.copy(tmp_path / "c" / "0.png", tmp_path / "c" / "deep" / "deeper" / "z.PNG")
    (tmp_path / "c" / "notes.txt").write_text("no picture")
    (tmp_path / "c" / ".hidden.png").write_text("no picture")
    (tmp_path / "a 2" / "1.heic").write_text("no picture that is read")
    (tmp_path / "list.csv").write_text("beside the classes")
    found = find_photos(tmp_path)
    assert found.class_names == ("B", "a 10", "a 2", "c")
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == [
        "B/0.png",
        "a 10/0.png",
        "a 2/0.png",
        "c/0.png",
        "c/deep/deeper/z.PNG",
    ]
    assert found.labels == (0, 1, 2, 3, 3)
    note = found.notes[0]
    assert note.startswith("2 files") and "1 .heic" in note and "1 .txt" in note


def test_examples_per_class_are_drawn_by_the_seed(tmp_path):
    write_photos(tmp_path, ["a", "b"], count=9)
    chosen = {seed: find_photos(tmp_path, 4, seed) for seed in range(3)}
    for found in chosen.values():
        assert found.labels == (0,) * 4 + (1,) * 4
        assert found.notes == ()
    assert chosen[0].files == find_photos(tmp_path, 4, 0).files
    assert len({found.files for found in chosen.values()}) == 3
    more = find_photos(tmp_path, 5, 0)
    assert set(chosen[0].files) < set(more.files)
    assert "2 classes have fewer than 10 pictures" in find_photos(tmp_path, 10, 0).notes[0]


def two_halves(mode="L", left=200, right=50):
    image = Image.new(mode, (8, 4), left)
    image.paste(right, (4, 0, 8, 4))
    return image


def with_alpha():
    """Return a picture that is red on the left and fully transparent on the right."""
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 4))
    return image


GREY, RED_ON_WHITE = ((200,) * 3, (50,) * 3), ((255, 0, 0), (255,) * 3)
SIXTEEN_BITS = np.asarray(two_halves()).astype(np.uint16) * 257
# file name: (picture, options of saving, expected left and right colour as RGB)
FORMATS = {
    "grey.png": (two_halves(), {}, GREY),
    "grey.jpg": (two_halves().resize((64, 32)), {"quality": 100}, GREY),
    "grey.webp": (two_halves().convert("RGB"), {"lossless": True}, GREY),
    "colour.bmp": (two_halves().convert("RGB"), {}, GREY),
    "one_bit.png": (two_halves(left=255, right=0).convert("1"), {}, ((255,) * 3, (0,) * 3)),
    "one_bit.tif": (two_halves(left=255, right=0).convert("1"), {}, ((255,) * 3, (0,) * 3)),
    "sixteen.png": (Image.fromarray(SIXTEEN_BITS), {}, GREY),
    "sixteen.tiff": (Image.fromarray(SIXTEEN_BITS), {}, GREY),
    "sixteen_white_zero.tif": (Image.fromarray(65535 - SIXTEEN_BITS), {"tiffinfo": {262: 0}}, GREY),
    "palette.png": (two_halves().convert("RGB").quantize(4), {}, GREY),
    "palette.bmp": (two_halves().convert("RGB").quantize(4), {}, GREY),
    "palette_alpha.png": (with_alpha().quantize(4), {}, RED_ON_WHITE),
    "alpha.png": (with_alpha(), {}, RED_ON_WHITE),
    "alpha.webp": (with_alpha(), {"lossless": True}, RED_ON_WHITE),
    "alpha.tif": (with_alpha(), {}, RED_ON_WHITE),
    "grey_alpha.png": (with_alpha().convert("LA"), {}, ((76,) * 3, (255,) * 3)),
    "grey_key.png": (two_halves(), {"transparency": 50}, ((200,) * 3, (255,) * 3)),
    "colour_key.png": (two_halves().convert("RGB"), {"transparency": (50,) * 3}, ((200,) * 3, (255,) * 3)),
    "cmyk.jpg": (two_halves().convert("RGB").convert("CMYK").resize((64, 32)), {"quality": 100}, GREY),
    "cmyk.tif": (two_halves().convert("RGB").convert("CMYK"), {}, GREY),
    "luma.tif": (two_halves().convert("RGB").convert("YCbCr"), {"compression": "tiff_lzw"}, GREY),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_mode_is_made_rgb(tmp_path, name):
    image, how, (left, right) = FORMATS[name]
    image.save(tmp_path / name, **how)
    opened = open_photo(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == image.size
    for x, expected in ((0, left), (opened.width - 1, right)):
        assert np.abs(np.subtract(opened.getpixel((x, 0)), expected)).max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, suffix, orientation):
    """Four grey levels, one per corner, distinguish all eight EXIF orientations."""
    upright = Image.new("L", (32, 16))
    for place, grey in (((0, 0), 20), ((16, 0), 90), ((0, 8), 160), ((16, 8), 230)):
        upright.paste(grey, (*place, place[0] + 16, place[1] + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = undo(upright.convert("RGB"), orientation)
    stored.save(tmp_path / f"picture.{suffix}", exif=exif, **({"quality": 100} if suffix in ("jpg", "webp") else {}))
    opened = open_photo(tmp_path / f"picture.{suffix}")
    assert opened.size == upright.size
    assert np.abs(np.asarray(opened.convert("L")).astype(int) - np.asarray(upright)).mean() < 3


def undo(image, orientation):
    """Return the picture as a camera stores it; the orientation then turns it upright."""
    turns = Image.Transpose
    steps = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    return image.transpose(steps[orientation]) if orientation in steps else image


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_defined_white_are_refused(tmp_path, mode):
    two_halves(mode).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep\.tif cannot be read: .* save it with 8 or 16 bits"):
        open_photo(tmp_path / "deep.tif")


def test_the_shorter_side_is_scaled_and_the_longer_one_cropped():
    image = Image.new("RGB", (60, 20), "blue")
    image.paste("red", (20, 0, 40, 20))
    for turned in (image, image.rotate(90, expand=True)):
        for position, colour in ((0.0, (0, 0, 255)), (0.5, (255, 0, 0)), (1.0, (0, 0, 255))):
            cut = crop_square(turned, 10, position)
            assert cut.size == (10, 10)
            assert cut.getpixel((5, 5)) == colour  # away from the border, where scaling mixes the colours


# Folders and links that nobody means


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", ".Trash-1000/files", ".git/x", "@eaDir/0.png", "__MACOSX", "#recycle", "deep/.hidden"],
)
def test_hidden_and_system_folders_are_skipped_at_every_depth_and_counted(root, name):
    for place in (root / CLASS_NAMES[0], root):
        (place / name).mkdir(parents=True)
        shutil.copy(root / CLASS_NAMES[1] / "0.png", place / name / "wrong.png")
    if name == "deep/.hidden":
        shutil.rmtree(root / "deep")
    found = find_photos(root)
    assert len(found.files) == 9 and len(found.class_names) == 3
    assert any("hidden and system folders and files" in note for note in found.notes)


def test_pictures_and_archives_beside_the_classes_are_counted(root):
    shutil.copy(root / CLASS_NAMES[0] / "0.png", root / "loose.png")
    with zipfile.ZipFile(root / "owls.zip", "w") as archive:
        archive.writestr("0.png", b"x")
    (root / "labels.csv").write_text("not counted")
    assert "2 pictures and archives lie beside the class folders; they are not used" in find_photos(root).notes


LINKS = {
    "to all classes": ("red kite/all", "", "all leads to .*birds, which holds the class folders; remove the link"),
    "to another class": ("red kite/more", "blue jay", r"red kite.more.0\.png and .*blue jay.0\.png, of another class"),
    "to a folder of another class": ("red kite/more", "blue jay/deep", r"more.8\.png and .*deep.8\.png, of another"),
    "of a class to another": ("owl", "blue jay", r"owl.\d\.png and .*blue jay.\d\.png, of another class, are the same"),
    "of a class to nothing": ("owl", "../nowhere", "owl is a link to nothing; repair or remove it"),
    "of a folder to nothing": ("red kite/more", "../nowhere", "more is a link to nothing"),
    "of a picture to another class": (
        "red kite/9.png",
        "blue jay/0.png",
        r"red kite.9\.png and .*blue jay.0\.png, of another",
    ),
    "to what contains all classes": ("red kite/up", "..", "up leads to .*, which holds the class folders"),
    "of a picture to nothing": ("red kite/9.png", "../nowhere", r"9\.png is a link to nothing"),
}


@ON_POSIX
@pytest.mark.parametrize("case", LINKS)
def test_a_link_that_would_mislabel_pictures_is_refused_by_name(root, case):
    link, target, message = LINKS[case]
    for name in ("red kite", "blue jay"):
        (root / name / "deep").mkdir()
        shutil.copy(root / name / "0.png", root / name / "deep" / "8.png")
    (root / link).symlink_to(root / target)
    with pytest.raises(InputError, match=f"data_dir: .*{message}"):
        find_photos(root)


@ON_POSIX
def test_two_links_that_form_a_loop_are_refused(root):
    (root / "red kite" / "x").symlink_to(root / "blue jay")
    (root / "blue jay" / "y").symlink_to(root / "red kite")
    with pytest.raises(InputError, match="of another class, are the same file"):
        find_photos(root)


@ON_POSIX
def test_links_to_pictures_and_folders_elsewhere_are_used_once(root, tmp_path):
    shutil.move(root / "red kite", tmp_path / "elsewhere")
    (root / "red kite").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep").mkdir()
    shutil.copy(root / "blue jay" / "0.png", tmp_path / "elsewhere" / "deep" / "9.png")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (root / "grey heron" / "8.png").symlink_to(root.parent / "single.png")
    shutil.copy(root / "blue jay" / "0.png", tmp_path / "single.png")
    (root / "blue jay" / "more.png").symlink_to("0.png")
    found = find_photos(root)
    assert found.labels == (0,) * 3 + (1,) * 4 + (2,) * 4
    assert "1 links lead to pictures that are used already" in found.notes


@ON_POSIX
def test_a_link_to_a_picture_that_another_class_links_to_is_refused(root, tmp_path):
    shutil.move(root / "red kite", tmp_path / "elsewhere")
    (root / "red kite").symlink_to(tmp_path / "elsewhere")
    (root / "grey heron" / "8.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    with pytest.raises(InputError, match=r"red kite.0\.png and .*grey heron.8\.png, of another class, are the same"):
        find_photos(root)


@ON_POSIX
def test_what_is_no_regular_file_is_not_read(root):
    """Opening a FIFO would wait for ever."""
    os.mkfifo(root / CLASS_NAMES[0] / "x.jpg")
    found = find_photos(root)
    assert len(found.files) == 9 and "1 .jpg" in found.notes[0]
    check_photos(found.files, found.labels)


@ON_POSIX
def test_a_file_name_that_is_not_utf_8_is_used(root):
    os.rename(root / CLASS_NAMES[0] / "0.png", os.fsencode(root / CLASS_NAMES[0]) + b"/caf\xe9.png")
    found = find_photos(root, examples_per_class=3)
    check_photos(found.files, found.labels)
    assert len(found.files) == 9


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "TEST"), ("fold1", "fold2"), ("train_images", "val2017", "logs")]
)
def test_splits_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        write_photos(tmp_path / "all" / name, count=1)
    with pytest.raises(InputError, match=rf"are splits, not classes; give one of them, such as .*{names[0]}"):
        find_photos(tmp_path / "all", option="test_dir")


def test_a_class_may_be_called_train_and_classes_may_have_one_folder_each(tmp_path):
    for name in ("bus", "train"):
        write_photos(tmp_path / name, ["images"], count=2)
    assert find_photos(tmp_path).class_names == ("bus", "train")


# Opening


def colour_profile(matrix, gamma):
    """Return a minimal matrix profile (ICC.1:2001-04, section 6)."""

    def fixed(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def point(values):
        return b"XYZ \0\0\0\0" + fixed(values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    parts = {b"desc": text, b"wtpt": point((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    parts |= {name: point(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), np.transpose(matrix))}
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(parts)), b""
    for name, part in parts.items():
        table += name + struct.pack(">II", 132 + 12 * len(parts) + len(body), len(part))
        body += part
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), bytes(4), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp" + bytes(28) + fixed((0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + table + body


WIDE = {
    "ProPhoto": colour_profile([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0, 0, 0.8249]], 1.8),
    "Display P3": colour_profile([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]], 2.2),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_colours_are_converted_from_the_profile_of_a_picture(tmp_path, name, suffix, has_alpha):
    colour, wide = (60, 160, 60), ImageCms.ImageCmsProfile(io.BytesIO(WIDE[name]))
    image = ImageCms.profileToProfile(Image.new("RGB", (40, 30), colour), ImageCms.createProfile("sRGB"), wide)
    assert np.abs(np.subtract(image.getpixel((0, 0)), colour)).max() > 5
    if has_alpha and suffix != "jpg":
        image.putalpha(255)
    how = {"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"x.{suffix}", icc_profile=WIDE[name], **how)
    assert np.abs(np.subtract(open_photo(tmp_path / f"x.{suffix}").getpixel((5, 5)), colour)).max() <= 3


@pytest.mark.parametrize("profile", [b"no profile", WIDE["ProPhoto"][:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_that_is_damaged_or_of_another_mode_is_ignored(tmp_path, profile, mode):
    Image.new("RGB", (40, 30), (90, 90, 90)).convert(mode).save(tmp_path / "x.jpg", icc_profile=profile, quality=100)
    assert np.abs(np.subtract(open_photo(tmp_path / "x.jpg").getpixel((5, 5)), (90, 90, 90))).max() <= 2


def noisy_jpeg(**how):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", **how)
    return stream.getvalue()


def thumbnail_in_exif():
    """Return EXIF with a JPEG in it, which has an end marker of its own."""
    return b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + noisy_jpeg(quality=5)[:9000] + b"\xff\xd9"


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"exif": thumbnail_in_exif()}], ids=str)
def test_half_a_jpeg_is_refused_and_a_whole_one_is_read(root, how):
    """The second half may be zeros: a download into a file of the final size that was interrupted."""
    content, file = noisy_jpeg(quality=90, **how), root / CLASS_NAMES[0] / "half.jpg"
    half = content[: len(content) // 2]
    for damaged in (half, half + bytes(len(content) - len(half))):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"half\.jpg cannot be read: its end is missing"):
            check(find_photos(root))
    for whole in (content, content + bytes(100), content + b"a trailer of the camera"):
        file.write_bytes(whole)
        check(find_photos(root))
        assert open_photo(file).size == (200, 200)


@pytest.mark.parametrize("how", [{}, {"lossless": True}, {"exif": thumbnail_in_exif() + bytes(300)}], ids=str)
def test_half_a_webp_is_refused_and_a_whole_one_is_read(root, how):
    stream, file = io.BytesIO(), root / CLASS_NAMES[0] / "half.webp"
    Image.open(io.BytesIO(noisy_jpeg())).save(stream, "WEBP", **how)
    content = stream.getvalue()
    half = content[: len(content) // 2]
    for damaged in (half, half + bytes(len(content) - len(half))):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"half\.webp cannot be read: "):
            check(find_photos(root))
    file.write_bytes(content)
    check(find_photos(root))


def exif(*entries, extra=b""):
    """Return EXIF that says that the picture is turned, with further entries (tag, type, count, value)."""
    entries = [(0x112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + extra


BROKEN_EXIF = {
    "two resolutions": (exif((0x11A, 3, 2, struct.pack("<HH", 72, 72))), True),
    "resolution as text": (exif((0x11A, 2, 3, b"72\0\0")), True),
    "beyond the end": (exif((0x10F, 2, 40, struct.pack("<I", 99999))), True),
    "zero denominator": (exif((0x11A, 5, 1, struct.pack("<I", 38)), extra=bytes(8)), True),
    "GPS is no offset": (exif((0x8825, 3, 2, struct.pack("<HH", 1, 1))), True),
    "unknown type": (exif((0x9000, 77, 1, b"abcd")), True),
    "rubbish": (b"Exif\0\0rubbish", False),
    "empty": (b"Exif\0\0", False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_a_broken_exif_tag_does_not_matter(tmp_path, case):
    content, is_turned = BROKEN_EXIF[case]
    Image.new("RGB", (60, 30)).save(tmp_path / "x.jpg", exif=content)
    assert open_photo(tmp_path / "x.jpg").size == ((30, 60) if is_turned else (60, 30))


def test_two_megabytes_of_text_in_a_png_do_not_matter(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png", pnginfo=text)
    assert open_photo(tmp_path / "x.png").size == (40, 40)


@pytest.mark.slow
def test_two_hundred_megapixels_are_read_and_more_than_any_camera_has_is_refused(tmp_path, capfd):
    Image.new("L", (16320, 12240), 180).save(tmp_path / "phone.jpg", quality=50)
    assert open_photo(tmp_path / "phone.jpg").size == (16320, 12240)
    Image.new("1", (30000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(
        InputError, match=r"bomb\.png cannot be read: it has 30000 x 20000 pixels, more than 500 million"
    ):
        open_photo(tmp_path / "bomb.png")
    assert capfd.readouterr().err == ""


def test_small_pictures_and_pages_are_counted(root):
    large = Image.linear_gradient("L").resize((64, 64))
    large.resize((8, 8)).save(root / CLASS_NAMES[0] / "scan.tif", save_all=True, append_images=[large])
    large.save(root / CLASS_NAMES[0] / "large.jpg")
    assert check(find_photos(root), 24) == (
        "10 pictures are smaller than 24 pixels; they are enlarged",
        "1 TIFF files have several pages; the first one is used, which may be a thumbnail",
    )
    assert len(check(find_photos(root), 8)) == 1


# Pictures that do not mean what they seem to


def deep_picture(bits, seed, colour=False):
    """Return noise of `bits` bits in a picture of 16, as bytes of a PNG or as a picture that Pillow can save."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (24, 24, 3) if colour else (24, 24)).astype(np.uint16)
    return png_of_16_bits(values) if colour else Image.fromarray(values)


def png_of_16_bits(values):
    """Return a PNG of 16-bit colours, which Pillow reads but does not write (PNG specification, section 11)."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "colour"])
def test_few_bits_in_files_of_16_are_refused_rather_than_black(tmp_path, bits, suffix):
    for seed, name in enumerate(("covid", "normal")):
        (tmp_path / name).mkdir()
        if suffix == "colour":
            (tmp_path / name / "0.png").write_bytes(deep_picture(bits, seed, colour=True))
        else:
            deep_picture(bits, seed).save(tmp_path / name / f"0.{suffix}")
    photos = find_photos(tmp_path)
    if bits == 16:
        assert check(photos) == ()
        return
    with pytest.raises(InputError, match="2 of 2 pictures of 16 bits are almost black or white, such as"):
        check(photos)
    for number in range(2):  # one class only is dark
        (tmp_path / "covid" / f"{number}.png").write_bytes(deep_picture(16, 2 + number, colour=True))
    (note,) = check(find_photos(tmp_path))
    assert note.startswith("warning: ") and "pictures of 16 bits are almost black or white" in note


def test_few_bits_are_found_where_white_is_zero(tmp_path):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        deep_picture(12, seed).save(tmp_path / name / "0.tif", tiffinfo={262: 0})
    with pytest.raises(InputError, match="2 of 2 pictures of 16 bits are almost black or white"):
        check(find_photos(tmp_path))


@pytest.mark.parametrize("width", [55, 720])
def test_dark_pictures_of_8_bits_are_not_taken_for_deep_ones(tmp_path, width):
    """The length of a row of a BMP, 2160 bytes, say, is no number of bits."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        night = np.random.default_rng(seed).integers(0, 40, (20, width, 3), dtype=np.uint8)
        Image.fromarray(night).save(tmp_path / name / "0.bmp")
    assert check(find_photos(tmp_path)) == ()


def test_pictures_of_one_colour_are_counted(root):
    Image.new("RGBA", (30, 30), (200, 10, 10, 0)).save(root / "red kite" / "transparent.png")
    Image.new("RGB", (64, 64), "grey").save(root / "blue jay" / "flat.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "blue jay" / "tiny.jpg")  # a single pixel at an eighth of its size
    (note,) = check(find_photos(root))
    assert note.startswith("warning: 2 pictures have a single colour, such as") and "flat.jpg" in note


def test_the_same_bytes_in_two_classes_are_counted_and_named(root):
    for number in range(2):
        shutil.copy(root / "red kite" / f"{number}.png", root / "blue jay" / f"copy{number}.png")
    shutil.copy(root / "red kite" / "2.png", root / "red kite" / "again.png")  # of the same class
    (note,) = check(find_photos(root))
    assert note.startswith("warning: 2 pictures lie in more than one class, with the same bytes, such as ")
    assert "copy0.png" in note and str(root / "red kite" / "0.png") in note


def test_class_folders_that_hold_only_folders_are_named(tmp_path):
    for name in ("a/airfield", "a/airplane_cabin", "b/bakery", "b/bar"):
        write_photos(tmp_path / "places" / name[0], [name[2:]], count=1)
    (tmp_path / "places" / "b" / "Thumbs.db").write_text("no picture")
    note = find_photos(tmp_path / "places").notes[-1]
    assert note.startswith("warning: the class folders hold only folders, such as airfield and airplane_cabin in a,")
    write_photos(tmp_path / "places", ["c"], count=1)
    assert not any("hold only folders" in note for note in find_photos(tmp_path / "places").notes)


def test_an_output_folder_is_no_folder_of_photos(tmp_path):
    write_photos(tmp_path, ["image", "mask"], count=1)
    assert find_photos(tmp_path).class_names == ("image", "mask")
    write_photos(tmp_path, ["weights"], count=1)
    for name in ("run.json", "metadata.jsonl", "image/gen_0000.png"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=r"is a data set of augmentation\.py, not a folder of photos"):
            find_photos(tmp_path)
        (tmp_path / name).unlink()


# Types of files


@pytest.mark.parametrize("suffix", [".ppm", ".pgm", ".pbm", ".pnm", ".jfif", ".jpe", ".gif", ".avif", ".mpo", ".jp2"])
def test_what_pillow_decodes_is_read_by_its_suffix(tmp_path, suffix):
    """GTSRB's traffic signs are PPM files; browsers save .jfif and .avif."""
    if suffix not in picture_suffixes():
        pytest.skip("this Pillow does not decode it")
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "JPEG"}.get(suffix)
    for name, grey in (("dark", 60), ("light", 190)):
        (tmp_path / name).mkdir()
        image = Image.linear_gradient("L").resize((32, 32)).point(lambda level, grey=grey: (level + grey) // 2)
        image.convert("1" if suffix == ".pbm" else "RGB" if suffix != ".pgm" else "L").save(
            tmp_path / name / f"0{suffix}", kind
        )
    found = find_photos(tmp_path)
    assert len(found.files) == 2 and found.notes == () and check(found) == ()
    dark, light = (np.asarray(open_photo(file).convert("L"), float).mean() for file in found.files)
    assert light - dark > (20 if suffix != ".pbm" else 0)


def test_a_pgm_of_any_depth_has_its_own_white(tmp_path):
    """A PGM says which value is white, here 1023."""
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">HH", 0, 1023))
    assert open_photo(tmp_path / "x.pgm").convert("L").tobytes() == bytes((0, 255))


def test_heic_is_named_with_a_package_that_reads_it(root):
    (root / "red kite" / "phone.HEIC").write_bytes(b"x")
    notes = find_photos(root).notes
    assert "1 .heic" in notes[0] and "pillow-heif" in notes[1]
