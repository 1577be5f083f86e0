"""Videos as files, with a JSON of everything that determines their pixels; pictures of labelled frames.

Videos are (T, H, W, 3) uint8.
"""
import json
import re
import subprocess
from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from support.cli import BadInput, atomic_write, one_line

# Tags for the colours that ffmpeg makes of RGB (BT.601's matrix, sRGB's curve), because players guess others
# at HD sizes. With `faststart`, a browser plays a video before it has loaded all of it.
FFMPEG_FLAGS = ["-color_range", "tv", "-colorspace", "smpte170m", "-movflags", "+faststart", "-x264-params",
                "colorprim=bt709:transfer=iec61966-2-1:colormatrix=smpte170m"]


def write_mp4(path, video, fps, quality):
    """Video -> H.264 file. Raises BadInput if frames are missing, because imageio hides ffmpeg's failures."""
    import imageio.v3 as iio
    try:
        # With a macro block of 1, imageio does not silently round the size up to a multiple of 16.
        iio.imwrite(path, video, plugin="FFMPEG", fps=fps, codec="libx264", quality=quality,
                    macro_block_size=1, output_params=FFMPEG_FLAGS)
        written = len(iio.imread(path, plugin="FFMPEG")) if path.stat().st_size else 0
    except OSError:
        written = 0
    if written < len(video):
        raise BadInput(f"ffmpeg did not write all {len(video)} frames of an mp4; make room, or install an "
                       f"ffmpeg with libx264; sample.py can write gifs instead (--format gif)")


def write_gif(path, video, fps):
    """Video -> GIF, at the nearest delay between frames that players honour, which is 1/50 s or more."""
    delay = 10 * max(2, round(100 / fps))  # GIF counts in 1/100 s, and players show shorter ones at 1/10 s
    frames = [Image.fromarray(frame).quantize() for frame in video]
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=delay, loop=0)


def check_ffmpeg(flag, other_way):
    """Raises BadInput, which names `flag`, unless ffmpeg is installed and runs."""
    import imageio_ffmpeg
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"{flag}: needs ffmpeg, which does not run ({one_line(error)}); pip install "
                       f"imageio[ffmpeg], unset IMAGEIO_FFMPEG_EXE, {other_way}") from None


def first_frames(path, num_frames):
    """Video file -> its first `num_frames` frames as RGB images. Raises ValueError if it has fewer."""
    import imageio.v3 as iio
    images = [Image.fromarray(frame) for frame in islice(iio.imiter(path, plugin="FFMPEG"), num_frames)]
    if len(images) < num_frames:
        raise ValueError(f"{len(images)} frames instead of {num_frames}")
    return images


# ------------------------------------------------------------------------------------------------------------
# A video, and beside it a JSON with everything that determines its pixels


def slug(text):
    """Any text -> a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def free_path(folder, stem, settings, endings):
    """FOLDER/STEM, or STEM-2 and so on, for a video with these settings; None if all its files exist.

    Files of that name without a JSON are not ours, so the next number is tried.
    """
    for number in count(1):
        path = folder / (stem if number == 1 else f"{stem}-{number}")
        files = [Path(f"{path}{ending}") for ending in (".json", *endings)]
        recorded = read_json(files[0])
        if recorded is None and not any(file.exists() for file in files):
            return path
        if recorded and {key: recorded.get(key) for key in settings} == settings:
            return None if all(file.exists() for file in files) else path


def read_json(path):
    """The dictionary in a JSON file, or None if it is missing or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def save_video(path, video, formats, fps, settings, pictures):
    """Writes path.mp4, .gif or .png, path-NAME.png of each picture, path.json of `settings` -> their paths.

    The JSON comes last, so a video that has one is complete. The gif comes first, to stay if ffmpeg fails.
    """
    writers = {"gif": lambda file: write_gif(file, video, fps),
               "mp4": lambda file: write_mp4(file, video, fps, quality=8),
               "png": lambda file: Image.fromarray(np.concatenate(list(video), axis=1)).save(file)}
    jobs = {f".{ending}": writers[ending] for ending in sorted(formats)}
    jobs |= {f"-{name}.png": picture.save for name, picture in pictures.items()}
    jobs[".json"] = lambda file: file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for ending, write in jobs.items():
        with atomic_write(Path(f"{path}{ending}")) as temporary:
            write(temporary)
    return [f"{path}{ending}" for ending in jobs]


# ------------------------------------------------------------------------------------------------------------
# Labels and sheets


def labelled(frames, label, width=None):
    """Images of one size -> a row of them under a label, each `width` wide, or large enough for the label."""
    images = [Image.fromarray(np.asarray(frame)) for frame in frames]
    width = width or images[0].width * max(1, round(128 / images[0].width))
    height = round(images[0].height * width / images[0].width)
    row = Image.new("RGB", (len(images) * width, height + 14), "white")
    ImageDraw.Draw(row).text((3, 1), label, fill="black")
    for i, image in enumerate(images):
        row.paste(image.resize((width, height), Image.BICUBIC), (i * width, 14))
    return row


def side_by_side(videos):
    """Label -> video, all of one size, becomes one video of them all, each under its label."""
    columns = [[labelled([frame], label) for frame in video] for label, video in videos.items()]
    return np.concatenate([np.stack(column) for column in columns], axis=2)


def sheet(videos, columns=8):
    """Label -> video becomes one picture: a row per video under its label, at most `columns` frames each."""
    rows = []
    for label, video in videos.items():
        shown = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        rows.append(labelled(video[shown], label))
    return Image.fromarray(np.concatenate(rows))
