"""Encoders: what is imported when, what is missing, second derivatives, and the published networks."""
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import isolated_rng, key_bits, keyed_normal
from ddrepro.nets.contrastive import contrastive_loss
from ddrepro.nets.encoders import TextProjection, dropout_mask, image_encoder, text_projection, trainable
from ddrepro.nets.text_encoders import PretrainedText, TfidfText, pretrained_text, text_encoder, unknown_share

has_extra = all(map(find_spec, ("timm", "peft", "transformers")))
with_extra = pytest.mark.skipif(not has_extra, reason="needs ddrepro[encoders]")
WORDS = ("dog", "boy", "girl", "man"), ("runs", "sits", "jumps"), ("here", "there", "outside")
CAPTIONS = [" ".join(words) for words in product(*WORDS)]


def test_nothing_optional_is_imported():
    code = ("import sys, ddrepro.nets.encoders, ddrepro.nets.text_encoders\n"
            "print({'timm', 'peft', 'transformers', 'huggingface_hub'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("package, use", [
    ("timm", lambda: image_encoder("nfnet_l0", 32)),
    ("transformers", lambda: text_encoder("bert")),
    ("peft", lambda: image_encoder("smallvit", 32, lora=2)),
])
def test_a_missing_package_is_named(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is needed .*ddrepro\[encoders\]"): use()


def unrolled(net, projection, x, y):
    "Two differentiable steps, then the squared parameters: a gradient to pictures and texts through the steps"
    parameters = {**{f"net.{n}": p for n, p in trainable(net).items()},
                  **{f"text.{n}": p for n, p in trainable(projection).items()}}
    both = torch.nn.ModuleDict({"net": net, "text": projection})
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = both

        def forward(self, x, y):
            text = self.both["text"](y, dropout_mask((len(y), 64), .1, 0, "test"))
            return contrastive_loss(self.both["net"](x), text)

    model = Loss()
    values = {f"both.{n}": p for n, p in parameters.items()}
    for _ in range(2):
        loss = torch.func.functional_call(model, values, (x, y))
        grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        values = {n: v - .1 * g for (n, v), g in zip(values.items(), grads)}
    return sum(v.square().sum() for v in values.values())


@pytest.mark.parametrize("name, settings", [("nfconvnet", dict(width=16)), ("smallvit", dict(width=64))])
def test_gradients_through_steps(name, settings):
    net, projection = image_encoder(name, 32, **settings).double(), text_projection(12, 64).double()
    assert net.features == 64
    x = keyed_normal((4, 3, 32, 32), 0, "test/x").double().requires_grad_()
    y = keyed_normal((4, 12), 0, "test/y").double().requires_grad_()
    gx, gy = torch.autograd.grad(unrolled(net, projection, x, y), (x, y))
    for i, (leaf, g) in enumerate(((x, gx), (y, gy))):
        # small: a ReLU's kink between the ends spoils it
        way, step = keyed_normal(tuple(leaf.shape), 1, "test/way").double(), 1e-7

        def moved(s): return ((leaf + s * way if j == i else other).detach() for j, other in enumerate((x, y)))

        ends = [unrolled(net, projection, *moved(s)).item() for s in (step, -step)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((g * way).sum().item(), rel=1e-3)


@with_extra
def test_second_derivatives_of_timm():
    net = image_encoder("vit_tiny_patch16_224", 32, pretrained=False, lora=2)
    assert net.net.blocks[0].attn.qkv.weight.shape == (576, 192)
    for p in trainable(net).values(): p.data += .01 * keyed_normal(tuple(p.shape), 0, "test/lora")
    x = keyed_normal((2, 3, 32, 32), 0, "test/x").requires_grad_()
    first = torch.autograd.grad(net(x).square().mean(), list(trainable(net).values()), create_graph=True)
    assert torch.autograd.grad(sum(g.square().sum() for g in first), x)[0].abs().max() > 0


@with_extra
@pytest.mark.parametrize("name, D", [("nfnet_l0", 2304), ("nf_resnet50", 1000), ("nf_regnet_b1", 1000)])
def test_normaliser_free_nets(name, D):
    net = image_encoder(name, 64, pretrained=False)
    x = keyed_normal((2, 3, 64, 64), 0, "test/x").requires_grad_()
    out = net(x)
    assert out.shape == (2, D) and net.features == D
    first = torch.autograd.grad(out.square().mean(), list(trainable(net).values())[:20], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), x)[0]
    assert torch.isfinite(second).all() and second.abs().max() > 0


@with_extra
def test_key_and_adapters():
    vit = partial(image_encoder, "vit_tiny_patch16_224", 32, pretrained=False)
    one, same, other = (vit(lora=4, indices=(i,)) for i in (0, 0, 1))
    assert all(torch.equal(p, same.get_parameter(n)) for n, p in one.named_parameters())
    assert any(not torch.equal(p, other.get_parameter(n)) for n, p in trainable(one).items())
    assert all("lora_" in n for n in trainable(one)) and not one.net.patch_embed.proj.weight.requires_grad
    plain = vit(indices=(0,))
    assert torch.equal(plain.net.blocks[0].attn.qkv.weight, one.net.blocks[0].attn.qkv.weight)
    small = image_encoder("smallvit", 32, width=32, lora=2)
    assert sum(p.numel() for p in trainable(small).values()) == 4 * 2 * 32 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))


@with_extra
def test_without_weights(monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.warns(UserWarning, match="vit_tiny_patch16_224 are not on this machine.*random weights"):
        net = image_encoder("vit_tiny_patch16_224", 32)
    plain = image_encoder("vit_tiny_patch16_224", 32, pretrained=False)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters()))
    with pytest.raises(OSError, match="HF_HOME"): image_encoder("vit_tiny_patch16_224", 32, pretrained=True)
    with pytest.raises(OSError, match="weights of no-such/model.*HF_HOME.*tfidf"):
        pretrained_text("bert", weights="no-such/model")
    assert constants.HF_HUB_OFFLINE is False


@with_extra
def test_text_models_from_a_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for c in CAPTIONS for w in c.split()})]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokens.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = dict(pad_token="[PAD]", unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=16, **names)
    size = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with isolated_rng(0, "test/models"):
        bert = BertModel(BertConfig(**size)).eval()
        config = CLIPTextConfig(**size, projection_dim=8, max_position_embeddings=16, bos_token_id=2, eos_token_id=3)
        clip = CLIPTextModelWithProjection(config).eval()
    for name, model, width in (("bert", bert, 16), ("sentence", bert, 16), ("clip", clip, 8)):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = text_encoder(name, weights=str(folder))
        texts = CAPTIONS[:5] + ["dog"]
        vectors = encoder.encode(texts)
        assert vectors.shape == (6, width)
        assert encoder.dim == width
        assert vectors.dtype == torch.float32
        assert not vectors.requires_grad
        in_twos = PretrainedText(name, model, tokenizer, batch=2)
        assert torch.allclose(vectors, in_twos.encode(texts, progress="texts"), atol=1e-5)
        ids = torch.tensor([[2, words.index("dog"), 3]])
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if name == "bert": expected = out.last_hidden_state[0, 0]
        elif name == "sentence": expected = out.last_hidden_state[0].mean(0)
        else: expected = out.text_embeds[0]
        assert torch.allclose(vectors[5], expected, atol=1e-5)


def test_tfidf_file(tmp_path):
    text = text_encoder("tfidf", CAPTIONS, dim=6, seed=3)
    path = text.save(tmp_path / "text.safetensors")
    assert torch.equal(TfidfText.load(path).encode(CAPTIONS), text.encode(CAPTIONS))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile): TfidfText.load(path)
    with pytest.raises(ValueError, match="dim must be below the 10 words"): TfidfText.fit(CAPTIONS, dim=10)


# whoever, whatever they do: sentences of languages without blanks
SENTENCES = {
    "Chinese": (("小狗", "花猫", "孩子", "老人"), ("在草地上奔跑", "在床上睡觉", "在河边吃东西")),
    "Japanese": (("子犬が", "三毛猫が", "子供が", "老人が"), ("草原を走る", "ベッドで眠る", "川辺で食べる")),
    "Thai": (("สุนัข", "แมวลาย", "เด็กชาย", "คนแก่"), ("วิ่งบนหญ้า", "นอนบนเตียง", "กินข้าวริมน้ำ")),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_without_blanks_are_told_by_characters(language):
    who, does = SENTENCES[language]
    captions = [a + b for a in who for b in does]
    for held in range(len(captions)):
        others = captions[:held] + captions[held + 1:]
        assert unknown_share([captions[held]], others, "tfidf_char") == 0
        if language != "Thai": assert unknown_share([captions[held]], others) == 1      # Thai's vowel signs part words
        vectors = text_encoder("tfidf_char", others, dim=6)
        near = torch.cosine_similarity(vectors.encode([captions[held]]), vectors.encode(others))
        best = others[near.argmax()]
        assert best.startswith(who[held // 3]) or best.endswith(does[held % 3])


def test_captions_of_single_characters():
    with pytest.raises(ValueError, match="no word of two letters or more .* 'tfidf_char' counts single characters"):
        text_encoder("tfidf", ["狗 跑", "猫 跑", "鸟 跳"], dim=1)
    assert text_encoder("tfidf_char", ["狗 跑", "猫 跑", "鸟 跳"], dim=1).encode(["狗 跳"]).abs().max() > 0
    with pytest.raises(ValueError, match="name must be one of 'tfidf', 'tfidf_char', 'bert', 'clip', 'sentence'"):
        text_encoder("tfidf_chars", ["a"])


def test_the_words_of_english_are_what_they_were():
    "No number of `tfidf` changed: by scikit-learn alone"
    rows = TfidfVectorizer().fit_transform(CAPTIONS)
    svd = TruncatedSVD(6, n_iter=7, random_state=key_bits(3, "encoders/tfidf") % 2**32)
    expected = svd.fit_transform(rows)
    ours = text_encoder("tfidf", CAPTIONS, dim=6, seed=3).encode(CAPTIONS).double().numpy()
    assert abs(ours * abs(expected).max() / abs(ours).max() - expected).max() < 1e-6


def test_projection_modes():
    p = TextProjection(5, 8, dropout=.5).train()
    y = keyed_normal((2000, 5), 0, "test/y")
    mask = dropout_mask((2000, 8), .5, 0, "test/mask")
    assert torch.equal(p(y, mask), p(y, mask))
    assert not torch.equal(p(y), p(y))
    assert torch.equal(p.eval()(y), p(y, torch.ones(2000, 8)))
    assert torch.equal(dropout_mask((3, 8), .5, 0, "test/mask"), mask[:3]) and set(mask.unique().tolist()) == {0., 2.}
    assert torch.equal(text_projection(5, 8, seed=4).first.weight, text_projection(5, 8, seed=4).first.weight)


@pytest.mark.parametrize("use, message", [
    (lambda: image_encoder("smallvit", 32, width=30), "multiple of the 4 heads"),
    (lambda: image_encoder("nfconvnet", 4), "at least 8 pixels"),
    (lambda: image_encoder("nfconvnet", 32, pretrained="yes"), "pretrained must be one of"),
    (lambda: text_encoder("clyp"), "nearest is 'clip'")])
def test_refusals(use, message):
    with pytest.raises(ValueError, match=message): use()
