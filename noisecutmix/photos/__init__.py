"""Real pictures, for fine-tuning and for the comparison: listed, checked, and opened as upright RGB pictures."""

from .listing import Photos as Photos
from .listing import Source as Source
from .listing import check_photos as check_photos
from .listing import find_photos as find_photos
from .listing import split_photos as split_photos
from .opening import crop_square as crop_square
from .opening import open_photo as open_photo
from .opening import read_size as read_size
from .published import find_archive as find_archive
