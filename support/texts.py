"""Texts: what a placeholder such as V* is, and captions and prompts that hold one.

Nothing to run here. A reader of the method may skip this page.
"""
import re

from cli import BadInput, one_line, read_text, warn
from model import TEXT_LENGTH, Tokenizer


def check_placeholder(placeholder, flag="--placeholder"):
    one_word = re.fullmatch(r"\S{1,32}", placeholder) and placeholder.isprintable()
    if not one_word or not re.search(r"\W", placeholder) or placeholder.startswith("#"):
        raise BadInput(f"{flag} {placeholder!r}: should be one word, without spaces, that holds a sign which "
                       f"ordinary words do not and does not begin with #, such as V* or <new1>")


def default_prompt(settings, subjects):
    names = [f"{subject.placeholder} {subject.class_word}" for subject in subjects]
    return settings.prompt.replace("V* {class word}", " and a ".join(names))


def without_placeholders(prompt, placeholders):
    """What the base and CLIP read in place of the subjects: "a V* dog" and "a V*-like dog" -> "a dog".

    The placeholders are found as the text tower finds them, by Tokenizer.
    """
    names = Tokenizer.cutter(placeholders).pattern
    prompt = re.sub(rf"(?:\b(?:called|named)\s+)?(?:{names})(?:['’]s\b|-\w+)?", " ", prompt)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(prompt.split()))


def made_up_words(prompt):
    """The words that look like placeholders, V* or <new1>, for the base alone, which knows no subject."""
    return re.findall(r"(?<!\w)(?:<[\w-]+>|[A-Za-z]\w*\*)(?!\w)", prompt)


def caption_file(picture):
    """NAME.jpg -> NAME.txt, or a file with one of the other names that captions have in use."""
    names = [picture.with_suffix(ending) for ending in (".txt", ".TXT", ".caption", ".CAPTION")]
    names += [picture.with_name(f"{picture.name}{ending}") for ending in (".txt", ".TXT", ".caption")]
    return next((path for path in names if path.exists()), names[0])


def read_caption(picture):
    """The text beside a picture, on one line; empty if there is none. Raises BadInput if it is not UTF-8."""
    path = caption_file(picture)
    try:
        return " ".join(read_text(path).split())
    except FileNotFoundError:
        return ""
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not a readable UTF-8 text file ({one_line(error)}); "
                       f"write the picture's caption there or delete it") from None


def subject_caption(picture, placeholder, class_word):
    """The caption beside a photo, with the placeholder in it where one is given. Raises BadInput."""
    path, caption = caption_file(picture), read_caption(picture)
    if not caption or not placeholder:
        return caption
    tokenizer = Tokenizer([placeholder])
    if not tokenizer.cut.search(caption):
        named = re.search(rf"(?<!\w){re.escape(class_word)}(?!\w)", caption, re.IGNORECASE)
        if not named:
            raise BadInput(f"{path}: holds neither {placeholder} nor {class_word}; write {placeholder} where "
                           f"the caption names the subject")
        caption = f"{caption[:named.start()]}{placeholder} {caption[named.start():]}"
        warn(f"{path}: lacks {placeholder}; read as {caption!r}")
    if tokenizer.ids[placeholder] not in tokenizer.encode(caption)[:TEXT_LENGTH - 2]:
        raise BadInput(f"{path}: {placeholder} comes after the {TEXT_LENGTH - 2} tokens that are read; "
                       f"put it earlier")
    return caption


def counted(photos, subject_words):
    """What a training has read: "4 photos of V* dog, 3 with a caption"."""
    captions = sum(bool(photo.caption) for photo in photos)
    return f"{len(photos)} photos of {subject_words}, {captions} with a caption"


def read_prompts(path):
    """--prompts: a text file with a prompt or a # comment per line -> list of prompts. Raises BadInput."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"--prompts {path}: not a readable UTF-8 text file ({one_line(error)})") from None
    prompts = [line for line in lines if not line.startswith("#")]
    if not prompts:
        raise BadInput(f"--prompts {path}: holds no prompt; write one on each line")
    for prompt in prompts:
        if re.search(r"\s--[a-z]+\s+\S", prompt):
            warn(f"--prompts {path}: {prompt!r} holds flags, which are read as words here; "
                 f"give them on the command line")
    return prompts


def pick_prompts(args, settings, subjects):
    """--prompts, --prompt or the base's own -> list of prompts, each checked. Raises BadInput; warns."""
    placeholders = [subject.placeholder for subject in subjects]
    if len(set(placeholders)) < len(placeholders):
        raise BadInput(f"--subject: {len(subjects)} subjects share the placeholder {placeholders[0]}; "
                       f"train one again with another --placeholder")
    if args.prompts:
        prompts = read_prompts(args.prompts)
    elif args.prompt:
        prompts = [args.prompt]
    elif subjects:
        prompts = [default_prompt(settings, subjects)]
    else:
        raise BadInput("--prompt: is needed where there is no subject")
    if not subjects:  # the base alone, asked what a subject's prompts ask
        prompts = [without_placeholders(prompt, made_up_words(prompt)) for prompt in prompts]
    check_prompts([args.negative_prompt], [], "--negative_prompt")
    check_prompts(prompts, placeholders, f"--prompts {args.prompts}" if args.prompts else "--prompt")
    return prompts


def check_prompts(prompts, placeholders, source):
    """Every prompt holds every placeholder where the text tower reads it: else BadInput, or a warning."""
    tokenizer = Tokenizer(placeholders)
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        kept, dropped = ids[:TEXT_LENGTH - 2], ids[TEXT_LENGTH - 2:]
        for word in placeholders:
            if tokenizer.ids[word] in dropped:
                raise BadInput(f"{source} {prompt!r}: {word} comes after the {TEXT_LENGTH - 2} tokens "
                               f"that are read; put it earlier")
            if tokenizer.ids[word] not in kept:
                warn(f"{source} {prompt!r}: {word} is not in it, so the video will hardly show that subject")
        if dropped:
            warn(f"{source}: only {TEXT_LENGTH - 2} tokens are read; "
                 f"dropped: {tokenizer.bpe.decode(dropped)!r}")
