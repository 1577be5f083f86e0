"""Photos of every kind become frames; samples follow from their number alone."""
import numpy as np
import pytest
import torch
from PIL import Image

from cli import BadInput
from data import crop, load_photos, load_picture, noise_sample, prior_sample, subject_sample
from paper.baselines import CustomDiffusion
from texts import check_placeholder


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


def test_large_photos_are_shrunk_once(tmp_path):
    Image.fromarray(gradient(400, 300)).save(tmp_path / "big.png")
    assert min(load_picture(tmp_path / "big.png", 32).size) == 64


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


def test_samples_follow_from_their_number(photos_folder):
    photos = load_photos(photos_folder, 64)
    assert len(photos) == 3
    sample = lambda i, seed=0: subject_sample(photos, i, seed, 32, 48, 8, "V* dog")
    for i in range(6):
        (a, text, weight), (b, again, _) = sample(i), sample(i)
        assert torch.equal(a, b) and text == again and "V*" in text
        assert torch.equal(weight, torch.ones(4, 6))
    assert not torch.equal(sample(0)[0], sample(0, seed=1)[0])
    captions = [sample(i)[1] for i in range(30)]
    assert captions.count("V* on a table") == 10  # every photo once per epoch; its own caption is used
    assert all("V* dog" in c for c in captions if c != "V* on a table") and len(set(captions)) > 2


def test_noise_and_prior_follow_from_the_samples_number():
    (t, eps), (t2, eps2) = noise_sample(5, 0, (4, 3, 4, 6), 1000), noise_sample(5, 0, (4, 3, 4, 6), 1000)
    assert t == t2 and torch.equal(eps, eps2)
    levels = [noise_sample(i, 0, (1,), 1000)[0] for i in range(400)]
    assert min(levels) < 30 and max(levels) > 970 and 450 < np.mean(levels) < 550
    pictures = [prior_sample(5, i, 0) for i in range(100)]
    assert pictures == [prior_sample(5, i, 0) for i in range(100)] and set(pictures) == {0, 1, 2, 3, 4}


def test_custom_diffusions_rescaling(photos_folder):
    """Words, grey border and loss weight belong together, in the proportions that its authors give."""
    photos, beginnings = load_photos(photos_folder, 128)[:1], []
    make_sample = CustomDiffusion.make_sample
    for i in range(300):
        frame, caption, weight = subject_sample(photos, i, 0, 128, 192, 8, "V* dog", make_sample)
        assert caption.endswith("photo of a V* dog") and frame.shape == (3, 128, 192)
        beginnings.append(caption.removesuffix("photo of a V* dog").strip())
        assert weight.mean().item() == pytest.approx(1, abs=1e-5)
        # (16, 24), 0 where a latent's 8x8 pixels are all grey
        cells = frame.unfold(1, 8, 8).unfold(2, 8, 8).abs().amax(dim=(0, 3, 4))
        if beginnings[-1] in ("a far away", "very small"):
            assert (cells[weight > 0] > 0).all() and 0 < (weight > 0).sum() < (cells > 0).sum() < 16 * 24
        else:
            assert torch.equal(weight, torch.ones(16, 24)) and (cells > 0).all()
    share = lambda *words: sum(beginning in words for beginning in beginnings) / len(beginnings)
    assert share("a far away", "very small") == pytest.approx(2 / 3 * 0.4, abs=0.08)
    assert share("zoomed in", "close up") == pytest.approx(1 / 3, abs=0.08) and len(set(beginnings)) == 5


def test_bad_folders_are_refused_and_bad_files_left_out(tmp_path, capsys):
    with pytest.raises(BadInput, match="no such folder"):
        load_photos(tmp_path / "nowhere", 64)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match="no readable file"):
        load_photos(tmp_path, 64)
    Image.fromarray(gradient()).save(tmp_path / "good.png")
    capsys.readouterr()
    photo, = load_photos(tmp_path, 64)
    assert np.array_equal(photo.image, gradient())
    assert "broken.jpg" in capsys.readouterr().err
    (tmp_path / "good.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="good.txt"):
        load_photos(tmp_path, 64)


@pytest.mark.parametrize("placeholder", ["", "dog", "V *", "x" * 40])
def test_placeholders_that_cannot_work_are_refused(placeholder):
    with pytest.raises(BadInput, match="--placeholder"):
        check_placeholder(placeholder)
