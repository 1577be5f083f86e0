"""How a subject can be learned: the paper's way, and the two methods that the paper compares with.

    python train.py --method custom_diffusion ...      # Kumari et al. 2023
    python train.py --method dreamvideo ...            # subject learning of Wei et al. 2024
    python train.py --targets cross ...                # the ablation in the paper's Table 2
    python sample.py --subject ... --lambdas "1*50"    # how to sample the two others: at full strength

Nothing to run here. A method says where its word starts, which layers it adds to the UNet, what a subject's
file calls their tensors, how a photo becomes a sample, how lambda is set in sampling, and what its authors'
settings are. train.py, sample.py and files.py look a method up in METHODS, and know nothing else of it.

Shapes: N any batch, S positions, L text tokens, C channels, D text width; frames (3, H, W) in [-1, 1].
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from cli import BadInput
from lora import MergedLoRA, add_lora, class_embedding, spatial_blocks
from model import TransformerBlock, UNet, pixels, zeroed


class CustomCrafter:
    """The paper's way: V* starts from the class word, LoRA is on the spatial attention."""
    published = {}                                  # its settings are VideoCrafter2's defaults (config.py)
    tensor_names = ("lora_A.weight", "lora_B.weight")                       # PEFT's
    staged = False
    make_sample = None                              # data.py's
    merge = MergedLoRA
    start_word = staticmethod(class_embedding)
    add_layers = staticmethod(add_lora)

    @staticmethod
    def before_step(loss, step, word_steps):
        """Everything is trained at every step."""


# ------------------------------------------------------------------------------------------------------------
# Custom Diffusion


class FullLinear(nn.Module):
    """A frozen linear layer with a trainable update of its whole matrix beside it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.lam = linear, 1.0
        self.delta = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))

    def forward(self, x):
        """Text (B, L, D) -> keys or values (B, L, C).

        Every prompt has the same first token, start-of-text. Nothing is learned from that token.
        """
        y = self.linear(x) + self.lam * F.linear(x, self.delta.to(x.dtype))
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)

    def tensors(self):
        return (self.delta,)


class CustomDiffusion:
    """The word and, in every cross-attention, the whole matrices of keys and values: 32 for VideoCrafter2."""
    published = {"lr": 8e-5, "steps": 500, "alpha": 1.0}
    tensor_names = ("delta.weight",)
    staged = False
    merge = MergedLoRA                              # a whole matrix is added as a product B A is
    before_step = staticmethod(CustomCrafter.before_step)

    @staticmethod
    def start_word(text_encoder, class_word):
        """(1, D): token 42170, "ktn" within a word, which ordinary text does not have."""
        return text_encoder.token_embedding.weight[42170:42171].float().clone()

    @staticmethod
    def add_layers(unet: UNet, rank, targets):
        """Puts a FullLinear around to_k and to_v of every cross-attention. Returns name -> layer."""
        layers = {}
        for block in spatial_blocks(unet):
            for name in (f"{block}.attn2.to_k", f"{block}.attn2.to_v"):
                layers[name] = FullLinear(unet.get_submodule(name))
                unet.set_submodule(name, layers[name])
        return layers

    @staticmethod
    def make_sample(photo, rng, height, width, factor, subject_words, flip=True):
        """A photo, if `flip` mirrored half of the time, shrunk or enlarged -> frame, caption, weight of the
        loss (h, w).

        A photo at less than 0.6 of its size lies somewhere on grey. There the loss counts inside the photo,
        one latent cell from the photo's edge. The weight's mean is 1, so the mean over the clip becomes the
        mean over what counts.
        """
        caption = photo.caption or f"photo of a {subject_words}"
        weight = torch.ones(height // factor, width // factor)
        scale = rng.uniform(1 / 3, 1) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
        h, w = round(scale * height), round(scale * width)
        image = ImageOps.mirror(photo.image) if flip and rng.random() < 0.5 else photo.image
        resized = lambda h, w: pixels(ImageOps.fit(image, (w, h), Image.BICUBIC))

        if scale < 0.6:
            frame = torch.zeros(3, height, width)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            frame[:, top:top + h, left:left + w] = resized(h, w)
            rows, columns = weight.shape
            first_row, first_column = min(top // factor + 1, rows - 1), min(left // factor + 1, columns - 1)
            last_row = max((top + h) // factor - 1, first_row + 1)
            last_column = max((left + w) // factor - 1, first_column + 1)
            inside = torch.zeros_like(weight)
            inside[first_row:last_row, first_column:last_column] = 1
            return frame, f"{rng.choice(['a far away', 'very small'])} {caption}", inside / inside.mean()
        if scale > 1:
            top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
            frame = resized(h, w)[:, top:top + height, left:left + width]
            return frame, f"{rng.choice(['zoomed in', 'close up'])} {caption}", weight
        return resized(height, width), caption, weight


# ------------------------------------------------------------------------------------------------------------
# DreamVideo


class Adapter(nn.Module):
    """The identity adapter: x <- attn2(norm2(x), text) + x + lambda * adapter(x), on x before the norm.

    It takes the places of its block's norm2 and attn2.
    """

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.norm, self.attn, self.lam = block.norm2, block.attn2, 1.0
        width, device = block.norm3.normalized_shape[0], block.norm3.weight.device
        self.down = nn.Linear(width, width // 2, device=device)
        self.up = zeroed(nn.Linear(width // 2, width, device=device))

    def put(self, block):
        block.norm2, block.attn2 = nn.Identity(), self

    def forward(self, x, context):
        """x (N, S, C), context (M, L, D) -> (N, S, C)"""
        linear = lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return self.attn(self.norm(x), context) + self.lam * linear(self.up, F.gelu(linear(self.down, x)))

    def tensors(self):
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias


class PutAdapters:
    """Sets lambda of DreamVideo's adapters, which are in their blocks only while lambda is not 0."""

    def __init__(self, unet: UNet, *subjects):
        self.blocks, self.adapters = {}, {}
        for subject in subjects:
            for name, tensors in subject.updates.items():
                block = unet.get_submodule(name)
                self.blocks.setdefault(name, (block, block.norm2, block.attn2))
                adapter = Adapter(block)
                for parameter, value in zip(adapter.tensors(), tensors):
                    parameter.data = value.to(parameter.device)
                adapter.put(block)                  # so the next subject's adapter goes around this one
                self.adapters[name] = self.adapters.get(name, []) + [adapter]
        self.set(0)

    def set(self, lam):
        for name, (block, norm2, attn2) in self.blocks.items():
            for adapter in self.adapters[name]:
                adapter.lam = lam
            if lam == 0:
                block.norm2, block.attn2 = norm2, attn2
            else:
                self.adapters[name][-1].put(block)


class DreamVideo:
    """First the word alone, then, with the word frozen, an adapter in every spatial block. No class prior."""
    published = {"word_steps": 3000, "word_lr": 1e-4, "steps": 4000, "lr": 1e-5, "weight_decay": 0.0,
                 "alpha": 0.0}
    tensor_names = ("adapter.down.weight", "adapter.down.bias", "adapter.up.weight", "adapter.up.bias")
    staged = True
    make_sample = None
    merge = PutAdapters
    start_word = staticmethod(class_embedding)

    @staticmethod
    def add_layers(unet: UNet, rank, targets):
        """Puts an Adapter into every spatial block. Returns name of the block -> Adapter."""
        layers = {}
        for name in spatial_blocks(unet):
            block = unet.get_submodule(name)
            layers[name] = Adapter(block)
            layers[name].put(block)
        return layers

    @staticmethod
    def before_step(loss, step, word_steps):
        """Chooses what step `step` trains: V* in the first `word_steps`, the adapters after."""
        loss.v_star.requires_grad_(step <= word_steps)
        for parameter in loss.updates:
            parameter.requires_grad_(step > word_steps)


# ------------------------------------------------------------------------------------------------------------
# Looking a method up


TARGETS = ("all", "cross")
METHODS = {"customcrafter": CustomCrafter, "custom_diffusion": CustomDiffusion, "dreamvideo": DreamVideo}


class MergedSubjects:
    """Sets lambda of several subjects at once, each as its method does."""

    def __init__(self, unet: UNet, subjects):
        by_class = {}
        for subject in subjects:
            by_class.setdefault(METHODS[subject.method].merge, []).append(subject)
        self.merged = [merge(unet, *subjects) for merge, subjects in by_class.items()]

    def set(self, lam):
        for merged in self.merged:
            merged.set(lam)


def add_method_flags(parser):
    """train.py's flags that choose a method, and those that only one method has."""
    parser.add_argument("--method", choices=list(METHODS), default="customcrafter",
                        help="how to learn: the paper's way, or one of those it compares with, at their "
                             "published settings, which are for large bases; sample those with "
                             "--lambdas \"1*50\" (default: %(default)s)")
    parser.add_argument("--targets", choices=TARGETS, default="all",
                        help="LoRA on all spatial attention, or on the cross-attention alone (paper, "
                             "Table 2) (default: %(default)s)")
    parser.add_argument("--word_steps", type=int,
                        help="dreamvideo: of --steps, the first that learn V* alone (published: 3,000)")
    parser.add_argument("--word_lr", type=float,
                        help="learning rate of V*, if not --lr (dreamvideo, published: 1e-4)")


def fill_published(args):
    """Flags left out take the method's published values. Raises BadInput for a flag of another method."""
    if args.targets != "all" and args.method != "customcrafter":
        raise BadInput(f"--targets {args.targets}: belongs to --method customcrafter; leave it out")
    if args.word_steps is not None and args.method != "dreamvideo":
        raise BadInput("--word_steps: belongs to --method dreamvideo; leave it out")
    for flag, value in METHODS[args.method].published.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if (args.word_steps or 0) > (args.steps or args.word_steps or 0):
        raise BadInput(f"--word_steps {args.word_steps}: should be at most --steps, which is {args.steps}; "
                       f"the adapters learn in the steps after")
