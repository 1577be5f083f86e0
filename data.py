"""Photos become still videos, a class word becomes prompts with V*, and pictures of the class become the prior.

Nothing to run here; train.py reads its samples from this page. What a sample is (photo, crop, caption) follows from the
training seed and the sample's number alone, never from the process that asks for it.

Shapes: frames (3, H, W) in [-1, 1]; still videos in latents (B, 4, T, h, w).
"""
import sys
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageOps

from model import BadInput, one_line

# "{}" is "V* dog". Custom Diffusion uses one such template; a few keep V* from binding to the words around it.
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}")
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VIDEOS = {".mp4", ".webm", ".avi", ".mov", ".mkv"}


@dataclass
class Photo:
    path: Path
    image: Image.Image    # RGB, upright
    caption: str          # from NAME.txt beside it; empty: take a template


def load_photos(folder, shortest):
    """Folder -> list of Photo, in the order of their names.

    `shortest`: pictures larger than twice this many pixels on their short side are shrunk once, here. Unreadable files
    are reported and left out. Raises BadInput if the folder is missing or no picture is left.
    """
    found = read_folder(folder, PICTURES, lambda path: load_picture(path, shortest), "--images", "4 to 6 photos of the subject")
    return [Photo(path, image, read_caption(path.with_suffix(".txt"))) for path, image in found]


def load_prior(folder, count, frames, height, width):
    """Folder -> the first `count` pictures and videos of the class, as a list of (video (1 or T, 3, H, W) in [-1, 1], caption).

    Of a video the first T = `frames` frames are taken; a shorter one is reported and left out, as is an unreadable file.
    The caption is from NAME.txt beside NAME.mp4, or empty. Raises BadInput if the folder is missing or nothing is left.
    """
    def load(path):
        images = load_video(path, frames) if path.suffix.lower() in VIDEOS else [load_picture(path, max(height, width))]
        return torch.stack([crop(image, height, width) for image in images])

    found = read_folder(folder, PICTURES | VIDEOS, load, "--prior", "pictures or videos of the class", count)
    return [(video, read_caption(path.with_suffix(".txt"))) for path, video in found]


def read_folder(folder, endings, read, flag, content, count=None):
    """The first `count` files that `read` can read -> list of (path, what it returned). The others get a warning each."""
    folder, found = Path(folder), []
    if not folder.is_dir():
        raise BadInput(f"{flag} {folder}: no such folder; it should hold {content}")
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith(".")):
        try:
            found.append((path, read(path)))
        except Exception as error:  # Pillow's and FFMPEG's readers each raise their own
            print(f"warning: {path}: not readable ({one_line(error)}); left out", file=sys.stderr)
        if len(found) == count:
            break
    if not found:
        raise BadInput(f"{flag} {folder}: holds no readable file ({', '.join(sorted(endings))}); it should hold {content}")
    return found


def load_video(path, frames):
    """Video file -> its first `frames` frames as RGB images. Raises ValueError if it has fewer."""
    images = [Image.fromarray(frame) for frame in islice(iio.imiter(path, plugin="FFMPEG"), frames)]
    if len(images) < frames:
        raise ValueError(f"has {len(images)} frames, and {frames} are needed")
    return images


def load_picture(path, shortest):
    """A file in any mode and orientation -> RGB, upright, transparent parts over white; of an animation the first frame.

    Pictures of more than Pillow's limit, 89 million pixels, are refused.
    """
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # 16-bit grey, which convert("RGB") would clip
            grey = np.asarray(image).astype(np.float32)
            top = 65535 if grey.max() > 255 else 255
            image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if min(image.size) > 2 * shortest:
        image = ImageOps.scale(image, 2 * shortest / min(image.size), Image.LANCZOS)
    return image


def read_caption(path):
    """NAME.txt -> its text on one line; empty if there is no such file. Raises BadInput if it is not UTF-8 text."""
    try:
        return " ".join(read_text(path).split())
    except FileNotFoundError:
        return ""
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not a readable UTF-8 text file ({error}); "
                       f"write the picture's caption there or delete it") from None


def read_text(path, limit=10**6):
    """A text file, with BOM or without. Raises ValueError if it is larger than `limit` bytes, or not UTF-8 text; OSError."""
    with open(path, "rb") as f:
        content = f.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    if b"\0" in content:
        raise ValueError("it is binary")
    return content.decode("utf-8-sig")


def crop(image, height, width, rng=None):
    """RGB image -> frame (3, H, W) in [-1, 1]: the largest centred crop of that shape.

    With a numpy Generator: at up to 1.15 times the scale, up to 5% off the centre, and mirrored half of the time.
    """
    zoom, dx, dy = (rng.uniform(1, 1.15), *rng.uniform(-0.05, 0.05, 2)) if rng else (1, 0, 0)
    w, h = image.size
    scale = max(width / w, height / h) * zoom
    cw, ch = min(width / scale, w), min(height / scale, h)          # the crop, in the image's own pixels
    left = min(max((w - cw) / 2 + dx * cw, 0), w - cw)
    top = min(max((h - ch) / 2 + dy * ch, 0), h - ch)
    image = image.resize((width, height), Image.BICUBIC, box=(left, top, left + cw, top + ch))
    if rng and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def subject_sample(photos, index, seed, height, width, words):
    """Sample number `index` of a run -> frame (3, H, W), caption, loss weight (h, w) of 1. Every photo comes once before any comes again.

    `words`: what fills a template, "V* dog".
    """
    photo, rng = draw_photo(photos, index, seed)
    caption = photo.caption or TEMPLATES[rng.integers(len(TEMPLATES))].format(words)
    return crop(photo.image, height, width, rng), caption, torch.ones(height // 8, width // 8)


def rescaled_sample(photos, index, seed, height, width, words):
    """The same, as Custom Diffusion does it: mirrored, and shrunk or enlarged with words in the caption that say so.

    A photo at less than 0.6 of its size lies somewhere on grey. There the loss counts only inside the photo, one latent cell from its
    edge; the weight's mean is 1, so that the mean over the clip becomes the mean over what counts.
    """
    photo, rng = draw_photo(photos, index, seed)
    caption, weight = photo.caption or f"photo of a {words}", torch.ones(height // 8, width // 8)
    scale = rng.uniform(1 / 3, 1) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
    h, w = (round(scale * side) for side in (height, width))
    image = ImageOps.mirror(photo.image) if rng.random() < 0.5 else photo.image
    if scale < 0.6:
        frame = torch.zeros(3, height, width)
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        frame[:, top:top + h, left:left + w] = crop(image, h, w)
        inside = torch.zeros_like(weight)
        inside[top // 8 + 1:max((top + h) // 8 - 1, top // 8 + 2), left // 8 + 1:max((left + w) // 8 - 1, left // 8 + 2)] = 1
        return frame, f"{rng.choice(['a far away', 'very small'])} {caption}", inside / inside.mean()
    if scale > 1:
        top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
        frame = crop(image, h, w)[:, top:top + height, left:left + width]
        return frame, f"{rng.choice(['zoomed in', 'close up'])} {caption}", weight
    return crop(image, height, width), caption, weight


def draw_photo(photos, index, seed):
    """-> the photo of sample number `index`, and a generator for the rest of that sample."""
    epoch, place = divmod(index, len(photos))
    photo = photos[np.random.default_rng((seed, 0, epoch)).permutation(len(photos))[place]]
    return photo, np.random.default_rng((seed, 1, index))


def prior_sample(count, index, seed):
    """Sample number `index` of a run -> which of `count` prior pictures it takes."""
    return int(np.random.default_rng((seed, 2, index)).integers(count))


def noise_sample(index, seed, shape, levels):
    """Sample number `index` of a run -> (t, eps): a noise level in 0 ... levels - 1 and Gaussian noise of the given shape."""
    rng = np.random.default_rng((seed, 3, index))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return int(rng.integers(levels)), torch.randn(shape, generator=generator)


def still_video(z, frames):
    """Latents of pictures (B, 4, h, w) -> still videos (B, 4, T, h, w): the paper's repetition of each photo N times.

    One encoded frame, repeated by reference: no memory, and T times less encoding.
    """
    return z[:, :, None].expand(-1, -1, frames, -1, -1)
