"""Photos of every kind become frames; samples follow from their number alone."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Samples, crop, load_photos, load_picture, load_prior, noise_sample
from model import Tokenizer
from support.config import SamplingDefaults, TrainingDefaults
from support.video import write_mp4


def gradient(w=60, h=40):
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 255 // (w - 1), y * 255 // (h - 1), np.full_like(x, 64)], -1).astype(np.uint8)


def test_any_mode_becomes_upright_rgb(tmp_path):
    rgb = gradient()
    rgba = np.concatenate([rgb, np.full((40, 60, 1), 255, np.uint8)], -1)
    rgba[:10, :, 3] = 0
    pictures = {"rgb.png": Image.fromarray(rgb),
                "rgba.png": Image.fromarray(rgba),
                "grey.png": Image.fromarray(rgb[..., 0]),
                "palette.png": Image.fromarray(rgb).quantize(64),
                "cmyk.jpg": Image.fromarray(rgb).convert("CMYK"),
                "one.png": Image.fromarray(rgb).convert("1"),
                "deep.png": Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for name in pictures:
        image = load_picture(tmp_path / name, 64)
        assert image.mode == "RGB" and image.size == (60, 40), name
    assert np.array_equal(load_picture(tmp_path / "rgb.png", 64), rgb)
    flat = np.asarray(load_picture(tmp_path / "rgba.png", 64))
    assert (flat[:10] == 255).all() and np.array_equal(flat[10:], rgb[10:])  # transparent parts over white
    deep = np.asarray(load_picture(tmp_path / "deep.png", 64))
    assert np.array_equal(deep[..., 0], rgb[..., 0])  # 16 bits, not clipped


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: shown upright, the picture is rotated by 90 degrees clockwise
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(load_picture(tmp_path / "turned.png", 64))
    assert np.array_equal(upright, np.rot90(gradient(), -1))


def test_crop_is_the_centre_and_fills_the_frame():
    for size in [(60, 40), (40, 60), (48, 32), (7, 200), (1, 1)]:
        frame = crop(Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)), 32, 48)
        assert frame.shape == (3, 32, 48) and torch.allclose(frame, torch.tensor(200 / 127.5 - 1))
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 24:72] = 255
    assert (crop(Image.fromarray(wide), 32, 48) == 1).all()


def test_random_crops_are_light():
    image, plain = Image.fromarray(gradient()), crop(Image.fromarray(gradient()), 32, 48)
    frames = [crop(image, 32, 48, np.random.default_rng(i)) for i in range(40)]
    unmirrored = [min((f - plain).abs().mean(), (f.flip(2) - plain).abs().mean()).item() for f in frames]
    assert max(unmirrored) < 0.15 and min(unmirrored) > 0
    mirrored = sum(((f.flip(2) - plain).abs().mean() < (f - plain).abs().mean()).item() for f in frames)
    assert 8 < mirrored < 32
    for i in range(40):
        frame = crop(image, 32, 48, np.random.default_rng(i), flip=False)
        assert (frame.flip(2) - plain).abs().mean() > (frame - plain).abs().mean()


# ------------------------------------------------------------------------------------------------------------
# Samples


@pytest.fixture()
def samples(photos_folder):
    """Makes the Samples of three photos and five prior clips. All values of clip k and of its context are k.

    Those of the empty caption's context are -1.
    """
    def samples(seed=0, dropout=0.0):
        of_clips = torch.arange(5.0)
        z = of_clips.view(5, 1, 1, 1, 1).expand(5, 4, 1, 4, 6)
        prior = z, of_clips.view(5, 1, 1).expand(5, 77, 32), torch.full((77, 32), -1.0)
        return Samples(load_photos(photos_folder, 32, 48, "V*", "dog"), "V*", "dog", prior, seed,
                       TrainingDefaults(caption_dropout=dropout), SamplingDefaults(height=32, width=48),
                       factor=8)
    return samples


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_samples_follow_from_their_number(samples):
    """The same on any number of processes, whichever samples came before."""
    four, again = samples().batch(range(4)), samples()
    assert equal(again.batch([2, 3]), [x[2:] for x in four])
    assert equal(again.batch([0, 1]), [x[:2] for x in four])
    assert not any(torch.equal(a, b) for a, b in zip(four, samples(seed=1).batch(range(4))))

    captions = [again.subject_sample(i)[1] for i in range(30)]
    assert captions.count("V* on a table") == 10  # every photo once per epoch; its own caption is used
    assert all("V* dog" in c for c in captions if c != "V* on a table") and len(set(captions)) > 2


def test_noise_and_prior_follow_from_the_samples_number(samples):
    (t, eps), (t2, eps2) = noise_sample(5, 0, (4, 3, 4, 6)), noise_sample(5, 0, (4, 3, 4, 6))
    assert t == t2 and torch.equal(eps, eps2)
    levels = [noise_sample(i, 0, (1,))[0] for i in range(400)]
    assert min(levels) < 30 and max(levels) > 970 and 450 < np.mean(levels) < 550

    _, _, t, eps, z_0, context, prior_t, prior_eps = samples().batch(range(100))
    assert set(z_0.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(context[:, 0, 0], z_0[:, 0, 0, 0, 0])                # a clip with its own caption
    noises = torch.cat([eps, prior_eps])
    assert len(torch.unique(noises.flatten(1), dim=0)) == 200               # no noise comes twice
    assert abs(torch.corrcoef(torch.stack([t, prior_t]).float())[0, 1]) < 0.3


def test_caption_dropout(samples):
    """The given share of captions is empty, of subject and prior independently; nothing else changes."""
    numbers = range(1000)
    with_all, dropped = samples(), samples(dropout=0.3)
    _, tokens, *_, context, _, _ = batch = dropped.batch(numbers)
    empty, = Tokenizer()([""])
    subject, prior = (tokens == empty).all(dim=1), (context == -1).flatten(1).all(dim=1)
    for share, expected in ((subject, 0.3), (prior, 0.3), (subject & prior, 0.09)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.04)
    assert equal(dropped.batch(numbers[500:510]), [x[500:510] for x in batch])

    _, all_tokens, *_, all_context, _, _ = all_captions = with_all.batch(numbers)
    assert torch.equal(tokens[~subject], all_tokens[~subject]) and not (all_tokens == empty).all(dim=1).any()
    assert torch.equal(context[~prior], all_context[~prior]) and (all_context >= 0).all()
    for i in (0, 2, 3, 4, 6, 7):    # images, noise and the prior's clips
        assert torch.equal(batch[i], all_captions[i])


# ------------------------------------------------------------------------------------------------------------
# Large photos, and pictures and videos of the class


def ramp(w, h, axis=1):
    """A picture whose grey grows along one side, from 0 to 255."""
    line = np.linspace(0, 255, (h, w)[axis])
    grey = np.broadcast_to(line if axis else line[:, None], (h, w))
    return Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8))


@pytest.mark.parametrize("size", [(12_000, 9_000), (16_320, 12_240)])
def test_phone_photos_are_scaled_down_while_they_are_decoded(tmp_path, monkeypatch, size):
    Image.new("L", size, 200).save(tmp_path / "phone.jpg", quality=50)
    decoded, real = [], data.in_srgb
    note = lambda image, profile: (decoded.append(image), real(image, profile))[1]
    monkeypatch.setattr(data, "in_srgb", note)
    image = load_picture(tmp_path / "phone.jpg", 512)
    assert min(image.size) == 1024 and image.getpixel((9, 9)) == (200, 200, 200)
    assert decoded[0].width <= size[0] / 4


@pytest.mark.parametrize("axis", [0, 1])
def test_prior_crops_lie_along_all_of_the_longer_side(tmp_path, axis):
    for i in range(40):
        ramp(*((256, 32) if axis else (32, 256)), axis).save(tmp_path / f"{i}.png")
    means, again = ([video.mean().item() for video, *_ in load_prior(tmp_path, 40, 1, 32, 32)]
                    for _ in range(2))
    assert min(means) < -0.75 and max(means) > 0.75     # centred crops have 0, the ends have -0.87 and 0.87
    assert means == again


def test_a_prior_video_keeps_its_crop_and_its_caption(tmp_path, capsys):
    write_mp4(tmp_path / "a.mp4", np.stack([np.asarray(ramp(256, 32))] * 3), 8, quality=10)
    (tmp_path / "a.txt").write_text("a dog on the grass")
    (tmp_path / "b.mp4").write_bytes(b"not a video")
    (still, caption, _), = load_prior(tmp_path, 2, 3, 32, 32)
    assert still.shape == (3, 3, 32, 32) and (still - still[:1]).abs().max() < 0.05
    assert caption == "a dog on the grass" and "b.mp4: not readable" in capsys.readouterr().err
