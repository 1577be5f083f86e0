"""Clips in and out: mp4, gif and png, each with a JSON of how it was made; labels, sheets of frames, motion.

Nothing to run here, and nothing of the paper. Videos are (T, H, W, 3) uint8.
"""
import json
import os
import re
import subprocess
import unicodedata
from itertools import count, islice

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw

from support.cli import BadInput, atomic_write, one_line

VIDEOS = {".mp4", ".webm", ".avi", ".mov", ".mkv"}
# The colours that ffmpeg writes for RGB: BT.601's matrix, sRGB's curve. Without the tags, players guess
# others at HD sizes. With `faststart`, a browser plays a video before it has loaded all of it.
FFMPEG_FLAGS = ["-color_range", "tv", "-colorspace", "smpte170m", "-movflags", "+faststart", "-x264-params",
                "colorprim=bt709:transfer=iec61966-2-1:colormatrix=smpte170m"]


def write_mp4(path, video, fps, quality):
    """Video -> H.264. Raises BadInput if a frame is missing, because imageio hides a failure of ffmpeg."""
    import imageio.v3 as iio
    try:
        # With a macro block of 1, imageio does not silently round the size up to a multiple of 16.
        iio.imwrite(path, video, plugin="FFMPEG", fps=fps, codec="libx264", quality=quality,
                    macro_block_size=1, output_params=FFMPEG_FLAGS)
        written = len(iio.imread(path, plugin="FFMPEG")) if path.stat().st_size else 0
    except OSError:
        written = 0
    if written < len(video):
        raise BadInput(f"{path}: ffmpeg did not write all {len(video)} frames; make room, install an ffmpeg "
                       f"with libx264, or pass --format gif")


def write_gif(path, video, fps):
    """Video -> GIF that keeps every frame, at the nearest delay that players honour: 1/50 s or longer."""
    delay = 10 * max(2, round(100 / fps))  # GIF counts in 1/100 s, and players show shorter ones at 1/10 s
    frames = [Image.fromarray(frame).quantize(255) for frame in video]
    for before, frame in zip(frames, frames[1:]):  # Pillow merges equal frames, so change one pixel a little
        if before.convert("RGB").tobytes() == frame.convert("RGB").tobytes():
            red, green, blue = frame.convert("RGB").getpixel((0, 0))
            palette = frame.getpalette()
            frame.putpalette((palette + [0] * 768)[:765] + [red, green, blue ^ 1])
            frame.putpixel((0, 0), 255)
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=delay, loop=0)


def check_ffmpeg(flag, other_way):
    """ffmpeg is installed, and runs. Raises BadInput that names `flag`."""
    import imageio_ffmpeg
    advice = "unset" if os.environ.get("IMAGEIO_FFMPEG_EXE") else "pip install imageio[ffmpeg], or correct"
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"{flag}: needs ffmpeg, which does not run ({one_line(error)}); {advice} "
                       f"IMAGEIO_FFMPEG_EXE, {other_way}") from None


def first_frames(path, num_frames):
    """Video file -> its first `num_frames` frames as RGB images. Raises ValueError if it has fewer."""
    import imageio.v3 as iio
    images = [Image.fromarray(frame) for frame in islice(iio.imiter(path, plugin="FFMPEG"), num_frames)]
    if len(images) < num_frames:
        raise ValueError(f"has {len(images)} frames, and {num_frames} are needed")
    return images


# ------------------------------------------------------------------------------------------------------------
# A video, and beside it a JSON with everything that determines its pixels


def slug(text):
    """Any text -> a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def with_ending(path, ending):
    """FOLDER/STEM -> FOLDER/STEM.gif or STEM-frames.png."""
    return path.with_name(f"{path.name}{ending}")


def free_path(folder, stem, settings, endings):
    """FOLDER/STEM, or STEM-2 ..., for a video made by `settings`; None if it exists with all its files.

    Files of that name without a JSON are someone else's, and stay.
    """
    for number in count(1):
        path = folder / (stem if number == 1 else f"{stem}-{number}")
        files = [with_ending(path, ending) for ending in (".json", *endings)]
        recorded = read_json(files[0])
        if recorded is None and not any(file.exists() for file in files):
            return path
        if recorded and {key: recorded.get(key) for key in settings} == settings:
            return None if all(file.exists() for file in files) else path


def read_json(path):
    """A JSON file's dictionary, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def save_video(path, video, formats, fps, settings, pictures):
    """Writes path.mp4, .gif or .png, path-NAME.png of each picture, path.json with `settings` -> their paths.

    The JSON comes last, so a video that has one is complete. The gif comes first: it stays if ffmpeg fails.
    """
    writers = {"gif": lambda file: write_gif(file, video, fps),
               "mp4": lambda file: write_mp4(file, video, fps, quality=8),
               "png": lambda file: Image.fromarray(np.concatenate(list(video), axis=1)).save(file)}
    jobs = {f".{ending}": writers[ending] for ending in sorted(formats)}
    jobs |= {f"-{name}.png": picture.save for name, picture in pictures.items()}
    jobs[".json"] = lambda file: file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for ending, write in jobs.items():
        with atomic_write(with_ending(path, ending)) as temporary:
            write(temporary)
    return [with_ending(path, ending) for ending in jobs]


# ------------------------------------------------------------------------------------------------------------
# Labels and sheets


def enlarged(frame):
    """(H, W, 3) -> PIL image at least 128 pixels wide, so that a label fits over it."""
    image = Image.fromarray(frame)
    factor = max(1, round(128 / image.width))
    return image.resize((factor * image.width, factor * image.height), Image.BICUBIC)


def labelled(images, label):
    """A row of images of one size with a label over it. The built-in font has ASCII letters only."""
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * width, height + 14), "white")
    letters = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    ImageDraw.Draw(row).text((3, 1), letters, fill="black")
    for i, image in enumerate(images):
        row.paste(image, (i * width, 14))
    return row


def side_by_side(videos):
    """Label -> video, all of one size, becomes one video with all of them under their labels."""
    columns = []
    for label, video in videos.items():
        columns.append(np.stack([np.asarray(labelled([enlarged(frame)], label)) for frame in video]))
    return np.concatenate(columns, axis=2)


def sheet(videos, columns=8):
    """Label -> video becomes one picture: a row per video under its label, at most `columns` frames each."""
    rows = []
    for label, video in videos.items():
        shown = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        rows.append(np.asarray(labelled([enlarged(video[t]) for t in shown], label)))
    return Image.fromarray(np.concatenate(rows))


# ------------------------------------------------------------------------------------------------------------
# Motion, as it forms


def motion_similarity(predicted, final):
    """How alike two clips (C, T, H, W) move: 1 for the same motion, 0 for a still clip.

    This is the correlation of each frame minus the clip's mean frame. It ignores how strong a motion is,
    because early predictions are averages of many clips, so they all move too weakly.
    """
    moving = [(clip - clip.mean(dim=1, keepdim=True)).flatten() for clip in (predicted, final)]
    return F.cosine_similarity(*moving, dim=0).item()


def motion_line(predicted, shown, enough=0.9):
    """A clip (C, T, H, W) as predicted at each step, the last time final -> a line of text on its motion.

    The first step with `enough` of the final motion is a K to try, because motion has formed by then.
    """
    shares = [motion_similarity(clip, predicted[-1]) for clip in predicted]
    if len(predicted[-1][0]) == 1 or max(shares) < enough:
        return "the clip does not move"
    first = next(i for i, share in enumerate(shares) if share >= enough)
    at_steps = ", ".join(f"{shares[i]:.2f} at step {i + 1}" for i in shown)
    return f"motion {at_steps}; the first step with {enough} of it is {first + 1}"
