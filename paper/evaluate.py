"""The paper's metrics: CLIP-T, CLIP-I, DINO-I and temporal consistency; and motion, which none of them sees.

    python evaluate.py --videos outputs/x --images photos/dog                 # towers from the hub
    python evaluate.py --videos outputs/x --images photos/dog --clip open_clip_model.safetensors --dino model.safetensors
    torchrun --nproc_per_node 4 evaluate.py --videos outputs/x outputs/y --images photos/dog     # a line for each folder

Reads the videos that sample.py wrote, and their prompts from the JSON beside each. The numbers are those of DreamVideo's
published protocol: features L2-normalised, all frames, mean over a video's frames or (photo, frame) pairs, plain mean over
videos. Clips of the base alone (`sample.py --subject none`) of the same prompt and seed, in the same folders or in --base_videos,
give the motion that a subject's video should keep. Prints a table; writes evaluation.json and evaluation.csv, a row a video.

Shapes: T frames, N photos, D features; videos (T, H, W, 3) uint8.
"""
import csv
import json
import os
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import open_clip
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from tqdm import tqdm

from data import load_photos
from model import BadInput, FlagParser, check_tensors, check_values, complete_or_absent, one_line, run_script
from sample import check_flags, without_placeholders

METRICS = ("CLIP-T", "CLIP-I", "DINO-I", "T.Cons", "motion", "motion of base")


def main():
    args = parse_args()
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("gloo")
    videos, base_videos = find_videos(args.videos), find_videos(args.base_videos) if args.base_videos else []
    photos = [photo.image for photo in load_photos(args.images, 10**6)]
    clip, dino = load_clip(args.clip, device), load_dino(args.dino, device)

    # The photos' features once, then every video against them.
    clip_photos, dino_photos = clip.images(photos), dino.images(photos)                     # (N, D) each
    rows, base_rows = [], []
    for path, facts in tqdm(videos[rank::world], desc="evaluate", unit="video", disable=rank > 0):
        video = read_video(path)                                                            # (T, H, W, 3)
        frames, row = [Image.fromarray(frame) for frame in video], describe(path, facts)
        clip_frames, dino_frames = clip.images(frames), dino.images(frames)                 # (T, D) each
        rows.append({**row, "CLIP-T": cosines(clip.text(row["text"]), clip_frames), "CLIP-I": cosines(clip_photos, clip_frames),
                     "DINO-I": cosines(dino_photos, dino_frames), "T.Cons": consistency(clip_frames), "motion": motion(video)})
    for path, facts in base_videos[rank::world]:
        base_rows.append({**describe(path, facts), "motion": motion(read_video(path))})

    # What all processes found becomes one table.
    found = [(rows, base_rows)]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, (rows, base_rows))
    rows, base_rows = (sorted((row for part in parts for row in part), key=lambda row: (row["folder"], row["video"]))
                       for parts in zip(*found))
    if rank == 0:
        base_motion(rows, rows + base_rows)
        report(rows, args.out or args.videos[0])


def describe(path, facts):
    """What identifies a video in the table. The text has the class word in place of V*, as CLIP and the base have to read it."""
    text = without_placeholders(facts["prompt"], [s["placeholder"] for s in facts["subjects"]])
    return {"folder": str(path.parent), "video": path.name, "text": text, "seed": facts["seed"],
            "subjects": " ".join(s["class_word"] for s in facts["subjects"])}


# ---------------------------------------------------------------------------------------------------------------------
# The metrics. Features are L2-normalised, so a product of two is a cosine.


def cosines(a, b):
    """a (N, D), b (T, D) -> mean cosine over all N x T pairs. CLIP-T with one text, CLIP-I and DINO-I with the photos."""
    return (a @ b.T).mean().item()


def consistency(frames):
    """Features of a video's frames (T, D) -> mean cosine of neighbours: T.Cons. A frozen video has 1, the best there is."""
    return (frames[1:] * frames[:-1]).sum(dim=1).mean().item()


def motion(video, width=128, block=16, reach=8, explained=0.5, visible=2.0):
    """How far things move from a frame to the next: (T, H, W, 3) uint8 -> mean over blocks, in percent of the picture's width.

    Every block of 16 pixels (of a picture at most 128 wide) is looked for in the next frame, up to 8 pixels away, and compared up
    to brightness and contrast. Its way counts only if it explains the change: what is left of the block is less than half of what
    is left in place. Nothing explains noise that is drawn anew for each frame, and flicker leaves nothing in place; both count
    as no motion at all, as do changes below 2 grey levels, which compression makes.
    """
    width = max(block, min(width, video.shape[2]) // block * block)
    size = (max(block, round(width * video.shape[1] / video.shape[2] / block) * block), width)
    grey = torch.from_numpy(video).float().mean(dim=-1, keepdim=True).permute(0, 3, 1, 2)   # (T, 1, H, W)
    grey = F.interpolate(grey, size, mode="area")
    now, then = grey[:-1], F.pad(grey[1:], [reach] * 4, mode="replicate")
    mean = lambda x: F.avg_pool2d(x, block)
    ways = sorted(((dx, dy) for dx in range(-reach, reach + 1) for dy in range(-reach, reach + 1)), key=lambda way: np.hypot(*way))
    left = []
    for dx, dy in ways:
        there = then[:, :, reach + dy:reach + dy + size[0], reach + dx:reach + dx + width]
        covariance = (mean(now * there) - mean(now) * mean(there)).clamp(min=0)
        left.append(mean(now ** 2) - mean(now) ** 2 - covariance ** 2 / (mean(there ** 2) - mean(there) ** 2).clamp(min=0.01))
    left = torch.stack(left)                                                                # (ways, T-1, 1, H/16, W/16)
    least, best = left.min(dim=0)
    length = torch.tensor([np.hypot(*way) for way in ways])[best]
    counts = (least < explained * left[0]) & (left[0] > visible ** 2)
    return (length * counts).mean().item() / width * 100


# ---------------------------------------------------------------------------------------------------------------------
# The towers


class Tower(torch.nn.Module):
    """A frozen image model (for CLIP, with its text model) as the metrics use it: float32, features L2-normalised."""

    def __init__(self, model, encode, resize, mean, std, tokenizer=None):
        super().__init__()
        self.model, self.encode, self.tokenizer = model.eval().requires_grad_(False), encode, tokenizer
        self.transform = transforms.Compose([
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
            transforms.Normalize(mean, std)])

    @torch.no_grad()
    def images(self, pictures, batch=16):
        """List of N RGB pictures of any size -> (N, D)."""
        device = next(self.model.parameters()).device
        parts = [pictures[i:i + batch] for i in range(0, len(pictures), batch)]
        features = [self.encode(self.model, torch.stack([self.transform(x) for x in part]).to(device)) for part in parts]
        return F.normalize(torch.cat(features).float().cpu(), dim=1)

    @torch.no_grad()
    def text(self, text):
        """A text -> (1, D)."""
        tokens = self.tokenizer([text]).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(tokens).float().cpu(), dim=1)


def load_clip(path, device):
    """OpenAI's ViT-B/32. The config is the -quickgelu one: `ViT-B-32` takes the weights as well, and scores wrongly."""
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    load_weights(model, path, "--clip", "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    return Tower(model, lambda model, x: model.encode_image(x), 224, (0.48145466, 0.4578275, 0.40821073),
                 (0.26862954, 0.26130258, 0.27577711), open_clip.get_tokenizer("ViT-B-32-quickgelu")).to(device)


def load_dino(path, device):
    """DINO's ViT-S/16, the class token after the norm. Resize 256, crop 224 as its authors do; timm's default is another crop."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    load_weights(model, path, "--dino", "timm/vit_small_patch16_224.dino", "model.safetensors")
    return Tower(model, lambda model, x: model(x), 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).to(device)


def load_weights(model, path, flag, repository, file):
    """A local file, else the hub's, into `model`, strictly. Raises BadInput. Nothing in the file is run."""
    if path is None:
        try:
            path = Path(hf_hub_download(repository, file))
        except Exception as error:  # the hub's, the network's and the disk's own errors share no base class
            raise BadInput(f"{flag}: could not download {repository} ({one_line(error)}); get {file} from "
                           f"https://huggingface.co/{repository} and name it with {flag} PATH") from None
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, TorchScript, safetensors and the disk each raise their own
        raise BadInput(f"{flag} {path}: not readable as plain weights ({one_line(error)}); {file} of {repository} is") from None
    check_tensors(f"{flag} {path}", state, model.state_dict())
    check_values(f"{flag} {path}", state)
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Files and tables


def find_videos(folders):
    """Folders -> list of (video file, the facts that sample.py wrote beside it). Raises BadInput if there is none."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"--videos {folder}: no such folder; name one that sample.py wrote into")
        for path in sorted(folder.glob("*.json")):
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                facts["prompt"] + "", facts["seed"] + 0, [(s["placeholder"], s["class_word"]) for s in facts["subjects"]]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # no video of ours, such as evaluation.json
            if facts.get("compare"):
                print(f"warning: {path}: shows several videos side by side (--compare); left out", file=sys.stderr)
                continue
            videos = [path.with_suffix(ending) for ending in (".mp4", ".gif") if path.with_suffix(ending).exists()]
            if videos:
                found.append((videos[0], facts))
    if not found:
        raise BadInput(f"--videos {' '.join(map(str, folders))}: no video with its JSON is there; sample.py writes both")
    return found


def read_video(path):
    """mp4 or gif -> (T, H, W, 3) uint8. Raises BadInput."""
    try:
        return iio.imread(path, **({"plugin": "FFMPEG"} if path.suffix == ".mp4" else {"plugin": "pillow", "mode": "RGB"}))
    except Exception as error:  # imageio's plugins each raise their own
        raise BadInput(f"{path}: not a readable video ({one_line(error)}); delete its JSON and sample it again") from None


def base_motion(rows, base_rows):
    """Writes into each row the motion that the base alone has with the same text and seed, if it is known, else None."""
    known = {(row["text"], row["seed"]): row["motion"] for row in base_rows if not row["subjects"]}
    for row in rows:
        row["motion of base"] = known.get((row["text"], row["seed"]))


def report(rows, out):
    """Prints a line for each folder, means with their standard errors; writes evaluation.json and evaluation.csv."""
    table = {}
    for row in rows:
        for metric in METRICS:
            if row[metric] is not None:
                table.setdefault(row["folder"], {}).setdefault(metric, []).append(row[metric])
    lines = {folder: {metric: (float(np.mean(x)), float(np.std(x) / len(x) ** 0.5), len(x)) for metric, x in values.items()}
             for folder, values in table.items()}
    print("| | videos | " + " | ".join(METRICS) + " |\n" + "|---" * (2 + len(METRICS)) + "|")
    for folder, line in lines.items():
        cells = [f"{line[m][0]:.3f} ± {line[m][1]:.3f}" if m in line else "–" for m in METRICS]
        print(f"| {folder} | {line['CLIP-T'][2]} | " + " | ".join(cells) + " |")
    with complete_or_absent(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps({"folders": lines, "videos": rows}, indent=1) + "\n", encoding="utf-8")
    with complete_or_absent(out / "evaluation.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"wrote {out / 'evaluation.json'} {out / 'evaluation.csv'}")


def parse_args():
    p = FlagParser(description="CLIP-T, CLIP-I, DINO-I, temporal consistency and motion of sampled videos.")
    p.add_argument("--videos", type=Path, nargs="+", required=True, help="folders that sample.py wrote into; a table line each")
    p.add_argument("--images", type=Path, required=True, help="folder with the subject's photos")
    p.add_argument("--base_videos", type=Path, nargs="+", default=[],
                   help="folders with clips of the base alone (sample.py --subject none), same prompts and seeds")
    p.add_argument("--clip", type=Path, help="weights of OpenAI's ViT-B/32 as open_clip names them (default: from the hub)")
    p.add_argument("--dino", type=Path, help="weights of DINO's ViT-S/16 as timm names them (default: from the hub)")
    p.add_argument("--out", type=Path, help="folder for evaluation.json and .csv (default: the first of --videos)")
    args = p.parse_args()
    check_flags(args)
    return args


if __name__ == "__main__":
    run_script(main)
