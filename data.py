"""A photo is read, becomes a still video, and becomes a sample that follows from its number alone.

Nothing to run here; train.py draws its samples from this page. A sample's photo, crop, caption, noise level
and noise follow from the training's seed and the sample's number. So any number of processes sees the same
samples, and a training that resumes needs no random state.

Shapes: images (3, H, W) in [-1, 1]; latents (B, 4, h, w), still videos in latents (B, 4, T, h, w); L text
tokens, D text width.
"""
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from model import NOISE_LEVELS, Z_CHANNELS, Tokenizer, pixels
from support.cli import BadInput, one_line, warn
from support.texts import read_caption, subject_caption
from support.video import first_frames

# "{}" is "V* dog". A few templates keep V* from binding to the words around it.
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}")


def still_video(z, num_frames):
    """Latents of photos (B, 4, h, w) -> still videos (B, 4, T, h, w): the paper repeats each photo N times.

    One encoded frame, repeated by reference: no memory, and T times less encoding.
    """
    return z[:, :, None].expand(-1, -1, num_frames, -1, -1)


# ------------------------------------------------------------------------------------------------------------
# Samples


class Samples:
    """A training's samples, by number: the same on any number of processes, and after any interruption."""

    def __init__(self, photos, placeholder, class_word, prior, seed, training, sampling, factor, flip=True):
        """`prior` is None, or latents (n, 4, T or 1, h, w) and contexts (n, L, D) of the class, and the
        context (L, D) of an empty caption. `factor` is H / h. `flip` mirrors half of the photos.
        """
        self.photos, self.prior, self.seed, self.training = photos, prior, seed, training
        self.subject_words = f"{placeholder} {class_word}"
        self.height, self.width, self.flip = sampling.height, sampling.width, flip
        self.z_shape = (Z_CHANNELS, training.frames, self.height // factor, self.width // factor)
        self.tokenizer = Tokenizer([placeholder])

    def share(self, process, step, micro_step):
        """The batch of one process in a micro-step, on its device. The processes take turns in batches."""
        n = ((step - 1) * self.training.grad_accum + micro_step) * process.world + process.rank
        B = self.training.batch_size
        return [x.to(process.device) for x in self.batch(range(n * B, (n + 1) * B))]

    def batch(self, numbers):
        """B sample numbers -> images (B, 3, H, W), tokens (B, L), t (B,), eps (B, 4, T, h, w) of the subject;
        then, with a prior, latents (B, 4, T, h, w), contexts (B, L, D), t and eps of the class.
        """
        images, captions = zip(*(self.subject_sample(i) for i in numbers))
        t, eps = zip(*(noise_sample(2 * i, self.seed, self.z_shape) for i in numbers))
        batch = [torch.stack(images), self.tokenizer(captions), torch.tensor(t), torch.stack(eps)]
        if self.prior:
            z, contexts, empty = self.prior
            chosen = [int(np.random.default_rng((self.seed, 2, i)).integers(len(z))) for i in numbers]
            z_0 = z[chosen] if z.shape[2] > 1 else still_video(z[chosen, :, 0], self.z_shape[1])
            context = [empty if self.drops_caption(i, 1) else contexts[k] for i, k in zip(numbers, chosen)]
            t, eps = zip(*(noise_sample(2 * i + 1, self.seed, z_0.shape[1:]) for i in numbers))
            batch += [z_0, torch.stack(context), torch.tensor(t), torch.stack(eps)]
        return batch

    def drops_caption(self, i, which):
        """Whether sample number i has an empty caption; `which` is 0 for the subject and 1 for the prior."""
        return np.random.default_rng((self.seed, 4, i)).random(2)[which] < self.training.caption_dropout

    def subject_sample(self, i):
        """Sample number i -> image (3, H, W), caption. No photo repeats before all photos were used."""
        photo, rng = self.photo_of(i), np.random.default_rng((self.seed, 1, i))
        caption = photo.caption or TEMPLATES[rng.integers(len(TEMPLATES))].format(self.subject_words)
        image = crop(photo.image, self.height, self.width, rng, flip=self.flip)
        return image, "" if self.drops_caption(i, 0) else caption

    def photo_of(self, i):
        epoch, place = divmod(i, len(self.photos))
        return self.photos[np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.photos))[place]]


def crop(image, height, width, rng=None, zoom=1.15, flip=True):
    """RGB image -> (3, H, W) in [-1, 1]: the largest centred crop of that shape.

    With a numpy Generator: random zoom up to `zoom`, random position, and a mirror image half of the time if
    `flip`.
    """
    zoom, x, y = (rng.uniform(1, zoom), *rng.uniform(0, 1, 2)) if rng else (1, 0.5, 0.5)
    w, h = image.size
    scale = max(width / w, height / h) * zoom
    crop_w, crop_h = min(width / scale, w), min(height / scale, h)          # in the image's own pixels
    left, top = x * (w - crop_w), y * (h - crop_h)
    image = image.resize((width, height), Image.BICUBIC, box=(left, top, left + crop_w, top + crop_h))
    if rng and flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return pixels(image)


def noise_sample(i, seed, shape):
    """Noise number i of a training -> t in 0 ... 999, and Gaussian eps of that shape."""
    rng = np.random.default_rng((seed, 3, i))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return int(rng.integers(NOISE_LEVELS)), torch.randn(shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------
# Reading photos, and pictures and videos of the class

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "MPO")  # Pillow would run a PostScript file
PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
VIDEOS = {".mp4", ".webm", ".avi", ".mov", ".mkv"}
UNREAD_PICTURES = {".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".svg", ".psd"}
Image.MAX_IMAGE_PIXELS = None   # Pillow's own limit, 179 million, is below a phone's 200 megapixels


@dataclass
class Photo:
    image: Image.Image    # RGB, upright
    caption: str          # from NAME.txt beside NAME.jpg; if empty, a template is used
    path: Path
    crc32: int            # of its file


def load_photos(folder, height, width, placeholder, class_word):
    """Folder -> list of Photo, in the order of their names, for frames of that size. Warns about poor photos.

    Large pictures are shrunk once, here. Raises BadInput if the folder is missing or has no readable picture.
    """
    load = lambda path: load_picture(path, max(height, width))
    pictures = read_folder(folder, PICTURES, load, "--images", "4 to 6 photos of the subject")
    photos = [Photo(image, subject_caption(path, placeholder, class_word), path, crc32(path.read_bytes()))
              for path, image in pictures]
    check_photos(photos, height, width)
    return photos


def check_photos(photos, height, width):
    """Warns about photos that are too small or lose more than half to the crop, and about stray captions."""
    for photo in photos:
        w, h = photo.image.size
        if w < width or h < height:
            warn(f"{photo.path}: smaller than {width}x{height} pixels, so enlarged; a larger one shows more")
        if not 0.5 <= (w * height) / (h * width) <= 2:
            warn(f"{photo.path}: a crop of {width}x{height} pixels loses more than half; crop nearer to that "
                 f"shape, or change --height and --width")
    captions = {photo.path.with_suffix(".txt") for photo in photos}
    for path in sorted(photos[0].path.parent.iterdir()):
        if path.suffix.lower() in (".txt", ".caption") and path not in captions:
            warn(f"{path}: skipped; the caption of a photo NAME.jpg is NAME.txt")


def load_prior(folder, count, num_frames, height, width):
    """Reads the first `count` pictures or videos -> list of video (1 or T, 3, H, W), caption, file's crc32.

    Of a video, only the first T = `num_frames` frames are read; a shorter video is skipped with a warning.
    A caption is empty if NAME.txt is missing. The crop position is seeded by the file name.
    """
    def load(path):
        is_video = path.suffix.lower() in VIDEOS
        images = first_frames(path, num_frames) if is_video else [load_picture(path, max(height, width))]
        seed = [*path.name.encode()]    # the same for every frame of a video
        return torch.stack([crop(image, height, width, np.random.default_rng(seed), zoom=1, flip=False)
                            for image in images])

    videos = read_folder(folder, PICTURES | VIDEOS, load, "--prior", "pictures or videos of the class", count)
    return [(video, read_caption(path), crc32(path.read_bytes())) for path, video in videos]


def read_folder(folder, endings, read, flag, content, count=None):
    """Reads the first `count` files that can be read -> list of (path, result). Warns about the others."""
    folder, results = Path(folder), []
    if not folder.is_dir():
        raise BadInput(f"{flag} {folder}: no such folder; it should hold {content}")
    for path in sorted(folder.iterdir()):
        ending = path.suffix.lower()
        if path.name.startswith(".") or len(results) == count:
            continue
        if path.is_dir() and any(file.suffix.lower() in endings for file in path.iterdir()):
            warn(f"{path}: subfolders are not read; skipped")
        elif ending in UNREAD_PICTURES or (ending in PICTURES | VIDEOS and ending not in endings):
            warn(f"{path}: {ending} is not read; skipped")
        elif ending in endings and path.is_file():
            try:
                results.append((path, read(path)))
            except Exception as error:  # Pillow and FFMPEG each raise errors of their own
                warn(f"{path}: not readable ({one_line(error)}); skipped")
    if not results:
        raise BadInput(f"{flag} {folder}: has no readable file ({', '.join(sorted(endings))}); "
                       f"it should hold {content}")
    return results


def load_picture(path, longest):
    """A picture file -> its first frame as an upright sRGB image, over white if it is transparent.

    A larger image is scaled down to a short side of 2 * `longest` pixels, already by the decoder if it can.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:  # broken EXIF
        image.draft("RGB", (2 * longest, 2 * longest))
        profile = image.info.get("icc_profile")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):      # convert("RGB") would clip 16 bits
            image = Image.fromarray((np.asarray(image) / 65535 * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = in_srgb(image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB"), profile)
    if min(image.size) > 2 * longest:
        image = ImageOps.scale(image, 2 * longest / min(image.size), Image.LANCZOS)
    return image


def in_srgb(image, profile):
    """An image and its colour profile -> sRGB image. A broken profile, or one of another mode, is ignored."""
    if profile:
        try:
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                             outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
