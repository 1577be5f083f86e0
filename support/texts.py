"""Captions and prompts: where they come from, and whether V* is in them."""
import re

from model import TEXT_LENGTH, Tokenizer
from support.cli import BadInput, one_line, warn


def without_placeholders(prompt, placeholders):
    """The prompt for the base and CLIP, which know no subjects: "a V* dog" and "a V*-like dog" -> "a dog"."""
    names = Tokenizer.splitter_at(placeholders).pattern
    prompt = re.sub(rf"(?:\b(?:called|named)\s+)?(?:{names})(?:['’]s\b|-\w+)?", " ", prompt)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(prompt.split()))


def read_text(path, source):
    """The content of a text file. Raises BadInput, which names `source`, unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise BadInput(f"{source}: not a readable UTF-8 text file ({one_line(error)})") from None


def read_caption(picture):
    """The caption in NAME.txt beside NAME.jpg, on one line, or "". Raises BadInput unless it is UTF-8."""
    path = picture.with_suffix(".txt")
    return " ".join(read_text(path, path).split()) if path.exists() else ""


def subject_caption(picture, placeholder, class_word):
    """The caption beside a photo. If it lacks the placeholder, that is inserted before the class word.

    Raises BadInput if the caption has neither, or if the placeholder comes too late to be read.
    """
    path, caption = picture.with_suffix(".txt"), read_caption(picture)
    if not caption:
        return caption
    if not Tokenizer.splitter_at([placeholder]).search(caption):
        class_name = re.search(rf"(?<!\w){re.escape(class_word)}(?!\w)", caption, re.IGNORECASE)
        if not class_name:
            raise BadInput(f"{path}: has neither {placeholder} nor {class_word}; insert {placeholder}")
        caption = f"{caption[:class_name.start()]}{placeholder} {caption[class_name.start():]}"
        warn(f"{path}: lacks {placeholder}; read as {caption!r}")
    tokens_of([caption], [placeholder], path)
    return caption


def pick_prompts(args, sampling, subjects):
    """--prompts, --prompt or the default prompt -> list of n prompts, and their tokens (n, L).

    Raises BadInput if there is no prompt, or if subjects share a placeholder. Warns as tokens_of does.
    """
    placeholders = [subject.placeholder for subject in subjects]
    source = f"--prompts {args.prompts}" if args.prompts else "--prompt"
    if len(set(placeholders)) < len(placeholders):
        raise BadInput("--subject: two subjects share a placeholder; train one with another --placeholder")
    if args.prompts:
        lines = [line.strip() for line in read_text(args.prompts, source).splitlines()]
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise BadInput(f"{source}: has no prompt; write one on each line")
    elif args.prompt is not None:
        prompts = [args.prompt]
    elif subjects:
        prompts = [sampling.prompt_for(subjects)]
    else:
        raise BadInput("--prompt: is needed without a subject")
    if not subjects:  # the base draws the class instead of the subject, without words such as V* or <new1>
        words = re.findall(r"(?<!\w)(?:<[\w-]+>|[A-Za-z]\w*\*)(?!\w)", "\n".join(prompts))
        prompts = [without_placeholders(prompt, words) for prompt in prompts]
    return prompts, tokens_of(prompts, placeholders, source)


def tokens_of(prompts, placeholders, source):
    """Prompts or captions -> tokens (n, L). Warns if one is too long or lacks a placeholder.

    Raises BadInput if a placeholder comes too late to be read.
    """
    tokenizer = Tokenizer(placeholders)
    tokens = tokenizer(prompts)
    for prompt, row in zip(prompts, tokens):
        for word in placeholders:
            if tokenizer.ids[word] not in row and word in tokenizer.splitter.findall(prompt):
                raise BadInput(f"{source} {prompt!r}: {word} comes after the 75 tokens that are read")
            if tokenizer.ids[word] not in row:
                warn(f"{source} {prompt!r}: lacks {word}, so the video will hardly show that subject")
        if row[-1] == tokenizer.bpe.eot_token_id and (dropped := tokenizer.encode(prompt)[TEXT_LENGTH - 2:]):
            warn(f"{source}: only 75 tokens are read; dropped: {tokenizer.bpe.decode(dropped)!r}")
    return tokens
