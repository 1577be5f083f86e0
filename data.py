"""A photo becomes a still video, and a sample follows from its number alone.

Nothing to run here; train.py draws its samples from this page. What sample number i is (photo, crop, caption,
noise level, noise) follows from the training's seed and from i. So any number of processes sees the same
samples, and a training that was stopped needs to remember no random state.

Shapes: frames (3, H, W) in [-1, 1]; latents (B, 4, h, w), still videos in latents (B, 4, T, h, w).
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from files import PICTURES, VIDEOS, file_crc32, load_picture, read_folder
from model import NOISE_LEVELS, Z_CHANNELS, pixels
from texts import read_caption, subject_caption
from video import first_frames

# "{}" is "V* dog". A few templates keep V* from binding to the words around it.
TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}")


def still_video(z, frames):
    """Latents of photos (B, 4, h, w) -> still videos (B, 4, T, h, w): the paper repeats each photo N times.

    One encoded frame, repeated by reference: no memory, and T times less encoding.
    """
    return z[:, :, None].expand(-1, -1, frames, -1, -1)


# ------------------------------------------------------------------------------------------------------------
# Samples


class Samples:
    """What a training sees. Sample number i is the same on any number of processes, and after any stop."""

    def __init__(self, photos, subject_words, prior_count, seed, sampling, factor, make_sample, flip):
        self.photos, self.subject_words, self.prior_count = photos, subject_words, prior_count
        self.seed, self.sampling, self.factor = seed, sampling, factor
        self.make_sample, self.flip = make_sample, flip

    def batch(self, numbers):
        """B sample numbers -> frames (B, 3, H, W), captions, weights (B, h, w); t (B,), eps (B, 4, T, h, w);
        and which pictures of the class prior go with them. With a prior, t and eps are for 2B clips.
        """
        sampling = self.sampling
        samples = [subject_sample(self.photos, i, self.seed, sampling.height, sampling.width, self.factor,
                                  self.subject_words, self.make_sample, self.flip) for i in numbers]
        frames, captions, weights = zip(*samples)
        which = [prior_sample(self.prior_count, i, self.seed) for i in numbers if self.prior_count]
        noise_numbers = [2 * i for i in numbers]
        if which:
            noise_numbers += [2 * i + 1 for i in numbers]
        shape = (Z_CHANNELS, sampling.frames, *weights[0].shape)
        t, eps = zip(*(noise_sample(i, self.seed, shape, NOISE_LEVELS) for i in noise_numbers))
        return torch.stack(frames), captions, torch.stack(weights), torch.tensor(t), torch.stack(eps), which


def subject_sample(photos, index, seed, height, width, factor, subject_words, make_sample=None, flip=True):
    """Sample number `index` of a training -> frame (3, H, W), caption, weight of the loss (h, w).

    Every photo comes once before any comes again. `subject_words` fills a template: "V* dog". `factor` is
    H / h. `make_sample` turns a photo into a sample in another method's way (paper/baselines.py).
    """
    epoch, place = divmod(index, len(photos))
    photo = photos[np.random.default_rng((seed, 0, epoch)).permutation(len(photos))[place]]
    rng = np.random.default_rng((seed, 1, index))
    if make_sample:
        return make_sample(photo, rng, height, width, factor, subject_words, flip)
    caption = photo.caption or TEMPLATES[rng.integers(len(TEMPLATES))].format(subject_words)
    frame = crop(photo.image, height, width, rng, flip=flip)
    return frame, caption, torch.ones(height // factor, width // factor)


def crop(image, height, width, rng=None, zoom=1.15, flip=True):
    """RGB image -> frame (3, H, W) in [-1, 1]: the largest centred crop of that shape.

    With a numpy Generator: up to `zoom` times the scale, anywhere in the image, if `flip` mirrored at times.
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


def prior_sample(count, index, seed):
    """Sample number `index` of a training -> which of `count` prior pictures it takes."""
    return int(np.random.default_rng((seed, 2, index)).integers(count))


def noise_sample(index, seed, shape, levels):
    """Sample number `index` of a training -> t in 0 ... levels - 1, and Gaussian noise eps of that shape."""
    rng = np.random.default_rng((seed, 3, index))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return int(rng.integers(levels)), torch.randn(shape, generator=generator)


# ------------------------------------------------------------------------------------------------------------
# Reading photos, and pictures and videos of the class


@dataclass
class Photo:
    image: Image.Image    # RGB, upright
    caption: str          # from NAME.txt beside NAME.jpg; empty: take a template
    path: Path
    crc32: int            # of its file


def load_photos(folder, shortest, placeholder="", class_word=""):
    """Folder -> list of Photo, in the order of their names. Unreadable files are reported and left out.

    A picture whose short side has more than twice `shortest` pixels is shrunk once, here. Raises BadInput
    if the folder is missing or no picture is left.
    """
    load = lambda path: load_picture(path, shortest)
    found = read_folder(folder, PICTURES, load, "--images", "4 to 6 photos of the subject")
    return [Photo(image, subject_caption(path, placeholder, class_word), path, file_crc32(path))
            for path, image in found]


def load_prior(folder, count, frames, height, width):
    """Folder -> list of video (1 or T, 3, H, W), caption, file's crc32: its first `count` of the class.

    Of a video the first T = `frames` frames are taken; a shorter video is reported and left out. A caption is
    empty where there is no NAME.txt. Where its crop lies along the longer side follows from its name.
    Raises BadInput as `load_photos`.
    """
    def load(path):
        place = [*path.name.encode()]  # a seed: the same for every frame of a video
        is_video = path.suffix.lower() in VIDEOS
        images = first_frames(path, frames) if is_video else [load_picture(path, max(height, width))]
        crops = [crop(image, height, width, np.random.default_rng(place), 1, False) for image in images]
        return torch.stack(crops)

    found = read_folder(folder, PICTURES | VIDEOS, load, "--prior", "pictures or videos of the class", count)
    return [(video, read_caption(path), file_crc32(path)) for path, video in found]
