"""Colours of a file without a profile that says in its EXIF that it is in Adobe RGB, as cameras write it (DCF 2.0).

GIMP, darktable, Photoshop and Windows show it so, and it is what was photographed; browsers don't look at EXIF.
"""

from PIL import ExifTags, Image

from finetune.data.images.gamma import SRGB_XY, Gamma

ADOBE_RGB = Gamma(256 / 563, (*SRGB_XY[:4], 0.21, 0.71, *SRGB_XY[6:]))  # Adobe RGB (1998), §4.3
KEY = "camera's colours"  # of an opened image's info
COLOUR_SPACE, INTEROPERABILITY_INDEX = 0xA001, 0x0001  # tags of EXIF (Exif 2.32, §4.6.5 and §4.6.7)
UNCALIBRATED, OPTIONAL = 65535, "R03"  # the colour space is another than sRGB, and it is Adobe RGB
OF_MICROSOFT = 2  # what Windows takes for Adobe RGB


def note(image: Image.Image) -> None:
    """Puts it into an opened image's info. Pillow would decode a PNG to look for EXIF behind its pixels: not here."""
    if image.format == "PNG" and "exif" not in image.info:
        return
    try:
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(COLOUR_SPACE)
        index = exif.get_ifd(ExifTags.IFD.Interop).get(INTEROPERABILITY_INDEX) if space == UNCALIBRATED else None
    except Exception:  # a broken EXIF block doesn't make the image unusable
        return
    if space == OF_MICROSOFT or (isinstance(index, str) and index.rstrip("\0 ") == OPTIONAL):
        image.info[KEY] = ADOBE_RGB
