"""The networks: sizes of the full UNet, shapes that are free, the learned words among the tokens."""
import torch

import model
from model import VOCAB_SIZE, Tokenizer, UNet, UNetConfig


def test_full_unet_has_1413_28_million_parameters():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 1_413_284_420
    assert len(unet.state_dict()) == 1484


def test_frames_height_and_width_are_free(base):
    """Any frame count runs, and a clip's result does not depend on what else is in the batch."""
    z = torch.randn(2, 4, 5, 4, 8)
    t, fps, context = torch.tensor([3, 900]), torch.tensor([8, 8]), torch.randn(2, 77, 32)
    with torch.no_grad():
        both = base.unet(z, t, fps, context)
        alone = base.unet(z[1:], t[1:], fps[1:], context[1:])
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_placeholder_becomes_one_learned_token():
    tokenizer = Tokenizer(["V*", "<new1>"])
    dog = tokenizer.encode("a dog")
    assert tokenizer.encode("a V* dog") == [dog[0], VOCAB_SIZE, dog[1]]
    assert tokenizer.encode("a V*, dog")[1] == VOCAB_SIZE
    assert tokenizer.encode("a <new1> dog")[1] == VOCAB_SIZE + 1
    assert all(i < VOCAB_SIZE for i in tokenizer.encode("a AV* dog"))       # part of another word
    assert tokenizer.encode("A Dog") == dog


def test_learned_row_replaces_only_its_token(base):
    tokenizer = Tokenizer(["V*"])
    dog = tokenizer.encode("dog")[0]
    row = base.text_encoder.token_embedding.weight[[dog]]
    with torch.no_grad():
        as_word = base.text_encoder(tokenizer(["a dog"]))
        other = base.text_encoder(tokenizer(["a V*"]), row + 1)
    assert torch.equal(other[:, :2], as_word[:, :2]) and not torch.allclose(other[:, 2:], as_word[:, 2:])


def test_temporal_attention_in_parts_is_the_same(base, monkeypatch):
    """CUDA's attention kernels take at most 65,535 sequences, so more are split; here into parts of 7."""
    z, context = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 77, 32)
    t, fps = torch.tensor([500]), torch.tensor([8])
    with torch.no_grad():
        whole = base.unet(z, t, fps, context)
        monkeypatch.setattr(model, "CUDA_GRID", 7)
        assert torch.allclose(base.unet(z, t, fps, context), whole, atol=1e-5)
