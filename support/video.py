"""Clips in and out: mp4, gif and png, each with a JSON of how it was made; labels, sheets of frames, motion.

Nothing to run here, and nothing of the paper. Videos are (T, H, W, 3) uint8.
"""
import json
import os
import re
import subprocess
import unicodedata
from itertools import islice

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw

from cli import BadInput, check_regular, complete_or_absent, one_line, quiet_libraries, read_json


# What ffmpeg makes of RGB: BT.601's matrix, sRGB's curve. Untagged, players guess another at HD sizes.
COLOURS = ["-color_range", "tv", "-colorspace", "smpte170m", "-x264-params",
           "colorprim=bt709:transfer=iec61966-2-1:colormatrix=smpte170m"]


def write_mp4(path, video, fps, quality):
    """Video -> H.264. macro_block_size 1 keeps the size, which imageio else rounds up to 16 in silence."""
    try:
        with quiet_libraries():
            iio.imwrite(path, video, plugin="FFMPEG", fps=fps, codec="libx264", quality=quality,
                        macro_block_size=1, output_params=COLOURS)
        # imageio hides ffmpeg's failure. It would read an empty file for ten seconds.
        complete = path.stat().st_size > 0 and len(read_video(path)) == len(video)
    except (OSError, BadInput):  # ffmpeg ended early, or what it wrote is no video
        complete = False
    if not complete:
        raise BadInput(f"{path}: ffmpeg did not write all {len(video)} frames; make room, take an ffmpeg "
                       f"with libx264, or pass --format gif")


def write_gif(path, video, fps):
    """Video -> GIF that keeps every frame, at the nearest delay that players honour: 1/50 s or longer."""
    delay = 10 * max(2, round(100 / fps))  # GIF counts in 1/100 s, and players show shorter ones at 1/10 s
    frames = [Image.fromarray(frame).quantize(255) for frame in video]
    for before, frame in zip(frames, frames[1:]):  # Pillow merges equals: nudge one pixel
        if before.convert("RGB").tobytes() == frame.convert("RGB").tobytes():
            red, green, blue = frame.convert("RGB").getpixel((0, 0))
            palette = frame.getpalette()
            frame.putpalette((palette + [0] * 768)[:765] + [red, green, blue ^ 1])
            frame.putpixel((0, 0), 255)
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=delay, loop=0)


def check_ffmpeg(flag, other_way):
    """An ffmpeg is there, and runs. Raises BadInput that names `flag`."""
    named = os.environ.get("IMAGEIO_FFMPEG_EXE")
    advice = "unset IMAGEIO_FFMPEG_EXE" if named else "pip install imageio[ffmpeg]"
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"{flag}: needs ffmpeg, which does not run ({one_line(error)}); {advice}, "
                       f"{other_way}") from None


def read_video(path, frames=None):
    """mp4 or gif -> video. Raises BadInput, also where there are not `frames` frames if they are given."""
    reader = {"plugin": "FFMPEG"} if path.suffix == ".mp4" else {"plugin": "pillow", "mode": "RGB"}
    try:
        check_regular(path)
        video = iio.imread(path, **reader)
        if frames not in (None, len(video)):
            raise ValueError(f"it has {len(video)} frames, and its JSON says {frames}")
        return video
    except Exception as error:  # imageio's plugins each raise their own
        if path.suffix == ".mp4":
            check_ffmpeg(path, "or move the mp4 away if its gif will do")
        hint = "delete its JSON and sample it again"
        raise BadInput(f"{path}: not a readable video ({one_line(error)}); {hint}") from None


def first_frames(path, frames):
    """Video file -> its first `frames` frames as RGB images. Raises ValueError if it has fewer."""
    images = [Image.fromarray(frame) for frame in islice(iio.imiter(path, plugin="FFMPEG"), frames)]
    if len(images) < frames:
        raise ValueError(f"has {len(images)} frames, and {frames} are needed")
    return images


# ------------------------------------------------------------------------------------------------------------
# A video, and beside it a JSON with all that its pixels depend on


def slug(text):
    """Any text -> a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def endings(args):
    """What sample.py writes of each video, as its flags ask."""
    pictures = ["-frames.png"] * args.compare + ["-process.png"] * args.show_process
    return [f".{ending}" for ending in args.format] + pictures


def with_ending(path, ending):
    """FOLDER/STEM -> FOLDER/STEM.gif or STEM-frames.png."""
    return path.with_name(f"{path.name}{ending}")


def free_path(folder, stem, facts, endings):
    """FOLDER/STEM, or STEM-2 ..., for a video that is made as `facts` says; None if all its files are there.

    Files of that name without a JSON are someone else's, or a killed run's, and stay. A file is there if it
    has as many bytes as its JSON says, so not where it was cut since.
    """
    for path in [folder / stem, *(folder / f"{stem}-{i}" for i in range(2, 10_000))]:
        facts_path = with_ending(path, ".json")
        found = facts_beside(facts_path)
        files = [with_ending(path, ending) for ending in endings]
        if found is None and not any(map(os.path.lexists, [facts_path, *files])):
            return path
        if found and {key: found.get(key) for key in facts} == facts:
            sizes = recorded_sizes(found)
            present = [file.is_file() and file.stat().st_size == sizes.get(file.name, file.stat().st_size)
                       for file in files]
            return None if all(present) else path


def facts_beside(path):
    """The JSON beside a video -> its entries; None if there is no such file, {} if it is not one of ours."""
    try:
        facts = read_json(path)
        return facts if isinstance(facts, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def recorded_sizes(facts):
    """File name -> bytes, of the files that a JSON speaks of."""
    sizes = facts.get("bytes")
    return sizes if isinstance(sizes, dict) else {}


def save_video(path, video, formats, fps, facts, pictures):
    """Writes path.mp4, .gif or .png, path-NAME.png of each picture, path.json with `facts` -> their paths.

    The JSON comes last, so a video that has one is complete.
    """
    written = []

    def file(ending):
        written.append(with_ending(path, ending))
        return complete_or_absent(written[-1])

    for ending in sorted(formats):  # the gif first: it stays if ffmpeg fails
        with file(f".{ending}") as temporary:
            if ending == "mp4":
                write_mp4(temporary, video, fps, quality=8)
            elif ending == "gif":
                write_gif(temporary, video, fps)
            else:
                Image.fromarray(np.concatenate(list(video), axis=1)).save(temporary)
    for name, picture in pictures.items():
        with file(f"-{name}.png") as temporary:
            picture.save(temporary)
    sizes = recorded_sizes(facts_beside(with_ending(path, ".json")) or {})
    with file(".json") as temporary:
        facts = facts | {"bytes": sizes | {file.name: file.stat().st_size for file in written[:-1]}}
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return written


# ------------------------------------------------------------------------------------------------------------
# Labels and sheets


def enlarged(frame):
    """(H, W, 3) -> PIL image at least 128 pixels wide, so that a label fits over it."""
    image = Image.fromarray(frame)
    factor = max(1, round(128 / image.width))
    return image.resize((factor * image.width, factor * image.height), Image.BICUBIC)


def ascii_letters(text):
    """Accents are taken off; letters that the built-in font does not have are left out."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def labelled(images, label):
    """A row of images of one size with a label over it."""
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * width, height + 14), "white")
    ImageDraw.Draw(row).text((3, 1), ascii_letters(label), fill="black")
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


def motion_held(predicted, final):
    """How far two clips (C, T, H, W) move alike: 1 for the same motion, 0 for a still clip.

    This is the correlation of what moves: each frame less the clip's mean frame. A correlation leaves out how
    strong a motion is. Early predictions are averages of many clips, so they are all too weak.
    """
    moving = [(clip - clip.mean(dim=1, keepdim=True)).flatten() for clip in (predicted, final)]
    return F.cosine_similarity(*moving, dim=0).item()


def motion_line(predicted, shown, enough=0.9):
    """A clip (C, T, H, W) as predicted at each step, the last time final -> a line of text on its motion.

    The first step that holds `enough` of the motion is a K to try: motion has formed by then.
    """
    held = [motion_held(clip, predicted[-1]) for clip in predicted]
    if len(predicted[-1][0]) == 1 or max(held) < enough:
        return "nothing moves in it"
    first = next(i for i, share in enumerate(held) if share >= enough)
    at_steps = ", ".join(f"{held[i]:.2f} at step {i + 1}" for i in shown)
    return f"motion {at_steps}; the first step with {enough} of it is {first + 1}"
