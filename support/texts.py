"""Captions beside photos, and prompts: where they come from, and whether V* is in them.

Nothing to run here. A reader of the method may skip this page.
"""
import os
import re

from model import TEXT_LENGTH, Tokenizer
from support.cli import BadInput, one_line, warn


def without_placeholders(prompt, placeholders):
    """What the base and CLIP read in place of the subjects: "a V* dog" and "a V*-like dog" -> "a dog".

    The placeholders are found as the text tower finds them, by Tokenizer.
    """
    names = Tokenizer.splitter_at(placeholders).pattern
    prompt = re.sub(rf"(?:\b(?:called|named)\s+)?(?:{names})(?:['’]s\b|-\w+)?", " ", prompt)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(prompt.split()))


def placeholders_like(prompt):
    """The words that look like placeholders, V* or <new1>, for the base alone, which knows no subject."""
    return re.findall(r"(?<!\w)(?:<[\w-]+>|[A-Za-z]\w*\*)(?!\w)", prompt)


# ------------------------------------------------------------------------------------------------------------
# Captions


def caption_file(picture):
    """NAME.jpg -> NAME.txt, or a file with one of the other names that captions commonly have."""
    names = [f"{stem}{ending}" for stem in (picture.stem, picture.name)
             for ending in (".txt", ".TXT", ".caption", ".CAPTION")]
    existing = (name for name in names if os.path.exists(picture.with_name(name)))  # False if too long a name
    return picture.with_name(next(existing, names[0]))


def read_caption(picture):
    """The text beside a picture, on one line; empty if there is none. Raises BadInput if it is not UTF-8."""
    path = caption_file(picture)
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) if os.path.exists(path) else ""
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not a readable UTF-8 text file ({one_line(error)}); "
                       f"write the picture's caption there or delete it") from None


def subject_caption(picture, placeholder, class_word):
    """The caption beside a photo, with the placeholder put before the class word if it lacks one.

    Raises BadInput if it has neither, or if the placeholder comes too late to be read.
    """
    path, caption = caption_file(picture), read_caption(picture)
    if not caption:
        return caption
    if not Tokenizer.splitter_at([placeholder]).search(caption):
        class_name = re.search(rf"(?<!\w){re.escape(class_word)}(?!\w)", caption, re.IGNORECASE)
        if not class_name:
            raise BadInput(f"{path}: has neither {placeholder} nor {class_word}; write {placeholder} where "
                           f"the caption names the subject")
        caption = f"{caption[:class_name.start()]}{placeholder} {caption[class_name.start():]}"
        warn(f"{path}: lacks {placeholder}; read as {caption!r}")
    tokens_of([caption], [placeholder], path)
    return caption


# ------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path):
    """--prompts: a text file with a prompt or a # comment per line -> list of prompts. Raises BadInput."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"--prompts {path}: not a readable UTF-8 text file ({one_line(error)})") from None
    prompts = [line for line in lines if not line.startswith("#")]
    if not prompts:
        raise BadInput(f"--prompts {path}: has no prompt; write one on each line")
    for prompt in prompts:
        if re.search(r"\s--[a-z]+\s+\S", prompt):
            warn(f"--prompts {path}: {prompt!r} holds flags, which are read as words here; "
                 f"give them on the command line")
    return prompts


def pick_prompts(args, sampling, subjects):
    """--prompts, --prompt or the base's own -> prompts, and their tokens (n, L). Raises BadInput; warns."""
    placeholders = [subject.placeholder for subject in subjects]
    if len(set(placeholders)) < len(placeholders):
        raise BadInput(f"--subject: {len(subjects)} subjects share the placeholder {placeholders[0]}; "
                       f"train one again with another --placeholder")
    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif args.prompt is not None:
        prompts = [args.prompt]
    elif subjects:
        prompts = [sampling.prompt_for(subjects)]
    else:
        raise BadInput("--prompt: is needed where there is no subject")
    if not subjects:  # the base is asked for the class instead of the subject
        prompts = [without_placeholders(prompt, placeholders_like(prompt)) for prompt in prompts]
    source = f"--prompts {args.prompts}" if args.prompts else "--prompt"
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
                raise BadInput(f"{source} {prompt!r}: {word} comes after the 75 tokens that are read; put it "
                               f"earlier")
            if tokenizer.ids[word] not in row:
                warn(f"{source} {prompt!r}: {word} is not in it, so the video will hardly show that subject")
        if row[-1] == tokenizer.bpe.eot_token_id and (dropped := tokenizer.encode(prompt)[TEXT_LENGTH - 2:]):
            warn(f"{source}: only 75 tokens are read; dropped: {tokenizer.bpe.decode(dropped)!r}")
    return tokens
