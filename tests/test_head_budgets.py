"""Profiles of head budgets: what a cache does with one, and the file that it comes from."""

import copy
import dataclasses
import json
import math
import os

import huggingface_hub
import pytest
import tiny
import torch
import zoo
from hub_server import OWNER_TOKEN
from test_hub_files import change_config, contents
from test_hub_publish import PUBLISHED, publishable
from test_snapshot import rewritten

from less_cache import CORM, H2O, AttentionMatching, HeadBudgets, LESSCache, LESSError, LESSKernels, SinkRecent
from less_cache.cache import snapshot
from less_cache.hub import catalogue, publish
from less_cache.integration.families import fingerprint
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME
from less_cache.kernels.head_budgets import BUDGETS_NAME, FORMAT_VERSION
from less_cache.slots import Setup, format_of

MODEL = tiny.tiny_llama()
TEXT = torch.randint(1, tiny.VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))
SHARES = [[0.5, 1.5], [0.75, 1.25]]
POLICIES = [AttentionMatching(8, every=4), H2O(4, 4), H2O(0.1, 0.1), SinkRecent(2, 8), SinkRecent(2, 0.1), CORM(8, 4)]
REPO = "owner/kernels"

each_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)


def profile(**changes) -> HeadBudgets:
    """Of `MODEL`."""
    known = {"layers": [0, 1], "model_type": "llama", "base_model": "org/tiny", "base_model_fingerprint": fingerprint(MODEL)}
    return HeadBudgets(**{"shares": SHARES, **known, "measured": {"data": ["prose.txt"], "budget": 0.05}, **changes})


@torch.no_grad()
def read(cache: LESSCache, stop: int = 80, steps: int = 0) -> torch.Tensor:
    """Logits of a prompt and of the tokens after it, one by one."""
    logits = [MODEL(TEXT[:, :stop], past_key_values=cache).logits]
    for token in range(stop, stop + steps):
        logits.append(MODEL(TEXT[:, token : token + 1], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def kept(cache: LESSCache) -> torch.Tensor:
    """Tokens of every head, `[b, L, g]`."""
    return torch.stack([(layer.held.slots.columns().positions >= 0).sum(-1) for layer in cache.layers], dim=1)


# A cache with a profile


@each_policy
def test_heads_keep_their_shares_and_together_the_budget(policy):
    cache = LESSCache(MODEL, policy, heads=profile())
    read(cache)
    counts = torch.stack([layer.held.rows.counts for layer in cache.layers], dim=1)  # [b, L, g, f]
    equal = policy.resolve(torch.tensor([80]))[0]  # [f]
    for count, field, mean in zip(counts.unbind(-1), dataclasses.fields(policy), equal, strict=True):
        shares = torch.ones(2, 2) if field.metadata.get("shared") else torch.tensor(SHARES)
        assert torch.equal(count, (shares * mean).round().long().expand(2, 2, 2)), field.name
        assert torch.equal(count.sum((1, 2)), 4 * mean.expand(2)), field.name
    if not isinstance(policy, CORM):  # it has no budget
        capacity = policy.capacity(equal[:, None, None, None]).item()
        assert torch.equal(kept(cache).sum((1, 2)), torch.full((2,), 4 * capacity))
        assert len(kept(cache)[0].unique()) > 1


@pytest.mark.parametrize("heads", [profile(), "adaptive"], ids=["profile", "adaptive"])
@torch.no_grad()
def test_layers_choose_one_by_one(heads):
    """Before the next layer reads the prompt; adaptive heads wait for the last."""
    cache, held = LESSCache(MODEL, AttentionMatching(8), heads=heads), []
    watch = MODEL.model.layers[1].register_forward_pre_hook(lambda *_: held.append(cache.layers[0].is_empty))
    try:
        read(cache)
    finally:
        watch.remove()
    assert held == [heads == "adaptive"]


@pytest.mark.parametrize("memory", [None, "low_rank", "soft_centroids"])
@pytest.mark.parametrize("policy", [H2O(4, 4), H2O(0.1, 0.1), SinkRecent(2, 8)], ids=repr)
def test_static_is_dynamic(policy, memory):
    kernels = memory and tiny.tiny_kernels(MODEL, memory=memory)
    caches = [LESSCache(MODEL, policy, kernels, static=static, heads=profile()) for static in (False, True)]
    logits = [read(cache, steps=15) for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert tiny.held_positions(one) == tiny.held_positions(other)
    assert kept(caches[1]).unique().numel() > 1
    buffers = {name: tensor.data_ptr() for name, tensor in caches[1].layers[0].allocated().items()}
    caches[1].reset()
    read(caches[1], steps=1)
    assert {name: tensor.data_ptr() for name, tensor in caches[1].layers[0].allocated().items()} == buffers


@each_policy
def test_a_profile_is_shares_of_ones_own(policy):
    caches = [LESSCache(MODEL, policy, heads=heads) for heads in (profile(), SHARES)]
    assert torch.equal(*(read(cache, steps=10) for cache in caches))


def beside(kernels: LESSKernels, budgets: HeadBudgets | None = None) -> LESSKernels:
    kernels.head_budgets = profile() if budgets is None else budgets
    return kernels


def test_which_heads_are_taken():
    """The profile by its name, or where heads cannot be adaptive; the log line and what is saved say so."""
    kernels = beside(tiny.tiny_kernels(MODEL))
    plain = tiny.tiny_kernels(MODEL)
    taken = {
        "asked for": LESSCache(MODEL, H2O(4, 4), kernels, heads="profile"),
        "static": LESSCache(MODEL, H2O(4, 4), kernels, static=True),
        "nothing to compare": LESSCache(MODEL, SinkRecent(2, 8), kernels),
        "given": LESSCache(MODEL, H2O(4, 4), plain, heads=profile()),
        "of a fork": LESSCache(MODEL, H2O(4, 4), kernels, heads="profile").fork(),
        "of a copy": copy.deepcopy(LESSCache(MODEL, H2O(4, 4), kernels, heads="profile")),
    }
    for name, cache in taken.items():
        assert cache.options.heads == profile(), name
        assert "heads profile" in str(cache.options) and cache.options.to_dict()["heads"]["shares"] == SHARES, name
        assert cache.layers[1].setup.shares.tolist() == SHARES[1], name
    others = {
        "equal": LESSCache(MODEL, H2O(4, 4), kernels),
        "equal, without a budget": LESSCache(MODEL, CORM(8, 4), kernels),
        "equal, static": LESSCache(MODEL, H2O(4, 4), kernels, static=True, heads="equal"),
        "static without one": LESSCache(MODEL, H2O(4, 4), plain, static=True),
        "adaptive": LESSCache(MODEL),
    }
    for name, cache in others.items():
        assert cache.options.heads == name.partition(",")[0].replace("static without one", "equal"), name
        assert all(layer.setup.shares is None for layer in cache.layers), name
    loaded = dataclasses.replace(profile(), source="somewhere")
    assert "heads profile of somewhere" in str(LESSCache(MODEL, H2O(4, 4), heads=loaded).options)


@pytest.mark.parametrize("static", [False, True])
def test_a_saved_cache_has_its_profile(static, tmp_path):
    cache = LESSCache(MODEL, H2O(4, 4), heads=profile())
    read(cache)
    cache.save(tmp_path / "cache")
    loaded = LESSCache.load(tmp_path / "cache", MODEL, static=static)
    assert loaded.options.heads == profile() and torch.equal(kept(loaded), kept(cache))
    with torch.no_grad():
        token = TEXT[:, 80:81]
        one, other = (MODEL(token, past_key_values=each).logits for each in (loaded, cache))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if static else 0)


def test_a_cache_saved_with_equal_heads_keeps_them(tmp_path):
    """Also by a version that knew no others, and with kernels beside which a profile lies now."""
    kernels = tiny.tiny_kernels(MODEL)
    cache = LESSCache(MODEL, SinkRecent(2, 8), kernels)
    read(cache)
    cache.save(tmp_path / "cache")
    without_heads(tmp_path / "cache")
    loaded = LESSCache.load(tmp_path / "cache", MODEL, beside(kernels), static=True)
    assert loaded.options.heads == "equal" and torch.equal(kept(loaded), kept(cache))


def without_heads(path) -> None:
    """The file as a version wrote it that knew no head budgets."""
    header, tensors = snapshot.read(path)
    assert header.pop("heads") == "equal"
    snapshot.write(path, header, tensors)


@pytest.mark.parametrize("heads", [{"shares": [[1.0]]}, {"shares": [[3.0, 3.0], [3.0, 3.0]]}, {"other": 1}, {}], ids=str)
def test_a_saved_cache_with_other_heads(heads, tmp_path):
    cache = LESSCache(MODEL, H2O(4, 4), heads=profile())
    read(cache)
    cache.save(tmp_path / "cache")
    rewritten(tmp_path / "cache", heads=heads)
    with pytest.raises(LESSError, match=r"is damaged|another model"):
        LESSCache.load(tmp_path / "cache", MODEL)


OTHERS = {
    "more layers": (
        lambda: tiny.tiny_llama(num_hidden_layers=3),
        r"full-attention layers \[0, 1, 2\], got those of 2 for .*\[0, 1\]",
    ),
    "more heads": (lambda: tiny.tiny_llama(num_key_value_heads=4), "expected shares of 4 KV heads .* got those of 2"),
    "architecture": (lambda: zoo.build("mistral"), "expected 'mistral', got 'llama'"),
    "weights": (lambda: changed(), "head budgets are for another base model: they were measured for 'org/tiny' .*fingerprint"),
}


def changed():
    model = tiny.tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, 2)
    return model


@pytest.mark.parametrize("build, message", OTHERS.values(), ids=OTHERS)
def test_another_model(build, message):
    model = build()
    with pytest.raises(LESSError, match=message):
        LESSCache(model, H2O(4, 4), heads=profile())


def test_a_derivative_on_purpose():
    budgets = profile()
    LESSCache(changed().config, H2O(4, 4), heads=budgets)  # a config cannot tell
    with pytest.raises(LESSError, match=r"set head_budgets\.base_model_fingerprint = None"):
        LESSCache(changed(), H2O(4, 4), heads=budgets)
    budgets.base_model_fingerprint = None
    LESSCache(changed(), H2O(4, 4), heads=budgets)


def test_a_copy_in_another_type():
    LESSCache(tiny.tiny_llama().to(torch.bfloat16), H2O(4, 4), heads=profile())


MADE = {"none": lambda _: None, "trained": tiny.tiny_kernels, "untrained": LESSKernels.untrained}


@pytest.mark.parametrize("kernels", MADE.values(), ids=MADE)
def test_no_profile_to_take(kernels):
    with pytest.raises(LESSError, match=rf"heads='profile' needs a {BUDGETS_NAME} in the kernels' folder.*less-cache profile"):
        LESSCache(MODEL, H2O(4, 4), kernels(MODEL), heads="profile")


# What a profile may say

UNLIKELY = {
    "no list": ({"shares": 5}, "shares to be a list for each layer, got 5"),
    "no layers": ({"shares": []}, "shares to be a list for each layer"),
    "no heads": ({"shares": [[], []]}, "shares to be a list for each layer"),
    "no rows": ({"shares": [1.0, 1.0]}, "shares to be a list for each layer"),
    "uneven": ({"shares": [[1.0, 1.0], [1.0]]}, r"as many shares for each layer, got \[1, 2\]"),
    "nothing": ({"shares": [[0.0, 2.0], [1.0, 1.0]]}, "above 0, got 0.0"),
    "less": ({"shares": [[-1.0, 3.0], [1.0, 1.0]]}, "above 0, got -1.0"),
    "NaN": ({"shares": [[math.nan, 1.0], [1.0, 1.0]]}, r"finite numbers above 0, got (nan|None)"),
    "infinite": ({"shares": [[math.inf, 1.0], [1.0, 1.0]]}, r"finite numbers above 0, got (inf|None)"),
    "null": ({"shares": [[None, 1.0], [1.0, 1.0]]}, "finite numbers above 0, got None"),
    "words": ({"shares": [["much", 1.0], [1.0, 1.0]]}, "finite numbers above 0, got 'much'"),
    "truth": ({"shares": [[True, 1.0], [1.0, 1.0]]}, "finite numbers above 0, got True"),
    "another mean": ({"shares": [[1.0, 1.5], [1.0, 1.5]]}, "1 on average, got 1.25. Divide"),
    "too many layers": ({"layers": [0, 1, 2]}, r"each of the 2 layers that have shares once, in order, got \[0, 1, 2\]"),
    "a layer twice": ({"layers": [1, 1]}, "once, in order"),
    "another order": ({"layers": [1, 0]}, "once, in order"),
    "below 0": ({"layers": [-1, 0]}, "indices below 10,000"),
    "no index": ({"layers": [0, 1.0]}, "indices below 10,000"),
    "layers in words": ({"layers": "all"}, "indices below 10,000, got 'all'"),
    "model type": ({"model_type": 5}, "model_type to be a string or null, got 5"),
    "base model": ({"base_model": []}, "base_model to be a string or null"),
    "fingerprint": ({"base_model_fingerprint": 5}, "base_model_fingerprint to be a string or null"),
    "measured": ({"measured": []}, r"measured to be a JSON object, got \[\]"),
    "version": ({"less_cache_version": 5}, "less_cache_version to be a string, got 5"),
}


@pytest.mark.parametrize("changes, message", UNLIKELY.values(), ids=UNLIKELY)
def test_what_cannot_be(changes, message, tmp_path):
    """When it is made, and when it is read, null for what JSON cannot say: one line, and the file's names the folder."""
    with pytest.raises(LESSError, match=message):
        profile(**changes)
    profile().save_pretrained(tmp_path)
    entries = json.loads((tmp_path / BUDGETS_NAME).read_text())
    (tmp_path / BUDGETS_NAME).write_text(json.dumps({**entries, **changes}))
    with pytest.raises(LESSError, match=message) as caught:
        HeadBudgets.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_is_short():
    with pytest.raises(LESSError) as caught:
        profile(layers=["x" * 10**6])
    assert len(str(caught.value)) < 200


# The file


def test_round_trip(tmp_path):
    budgets = profile()
    budgets.save_pretrained(str(tmp_path / "new" / "folders"))
    loaded = HeadBudgets.from_pretrained(tmp_path / "new" / "folders")
    assert loaded == budgets and loaded.source == str(tmp_path / "new" / "folders")
    assert loaded.to_dict() == budgets.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "new" / "folders")
    assert set(contents(tmp_path / "again")) == {BUDGETS_NAME} and "folders" not in budgets.to_json()


def test_layers_of_their_own_order():
    assert HeadBudgets(SHARES).layers == [0, 1]
    assert repr(profile()) == "HeadBudgets(2 layers of 2 KV heads, 0.50 to 1.50 of the mean, of org/tiny)"


def change(**changes):
    def damage(folder) -> None:
        entries = json.loads((folder / BUDGETS_NAME).read_text())
        (folder / BUDGETS_NAME).write_text(json.dumps({**entries, **changes}))

    return damage


def write(content: bytes):
    return lambda folder: (folder / BUDGETS_NAME).write_bytes(content)


def link_out(folder) -> None:
    (folder / BUDGETS_NAME).rename(folder.parent / "elsewhere.json")
    (folder / BUDGETS_NAME).symlink_to(folder.parent / "elsewhere.json")


def drop_shares(folder) -> None:
    entries = json.loads((folder / BUDGETS_NAME).read_text())
    del entries["shares"]
    (folder / BUDGETS_NAME).write_text(json.dumps(entries))


def pipe(folder) -> None:
    (folder / BUDGETS_NAME).unlink()
    os.mkfifo(folder / BUDGETS_NAME)


DAMAGES = {
    "no file": (lambda folder: (folder / BUDGETS_NAME).unlink(), f"expected {BUDGETS_NAME}, found none. Measure it"),
    "a pipe": (pipe, f"expected {BUDGETS_NAME}"),
    "link out of the folder": (link_out, "a symbolic link out of the folder"),
    "binary": (write(b"\xff\xfe\x00"), "expected JSON in UTF-8"),
    "cut": (write(b'{"shares": [[1'), f"{BUDGETS_NAME}: expected JSON"),
    "a list": (write(b"[]"), f"{BUDGETS_NAME}: expected a JSON object, got list"),
    "deep": (write(b"[" * 100_000), f"{BUDGETS_NAME}: expected JSON"),
    "a terabyte": (lambda folder: os.truncate(folder / BUDGETS_NAME, 10**12), "expected at most 10,000,000 bytes of JSON"),
    "no shares": (drop_shares, "an entry is missing: .*'shares'"),
    "unknown key": (change(alpha=1), r"unknown keys \['alpha'\]"),
    "a source": (change(source="/somewhere"), r"unknown keys \['source'\]"),
    "newer": (change(format_version=FORMAT_VERSION + 1, less_cache_version="9.1"), "got 2, .*pip install -U 'less-cache>=9.1'"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(damage, message, tmp_path):
    """Alone, and beside kernels, which are not handed out then; without the file they are."""
    folder = tmp_path / "folder"
    publishable().save_pretrained(folder)
    profile().save_pretrained(folder)
    damage(folder)
    for load in (HeadBudgets.from_pretrained, LESSKernels.from_pretrained)[: 1 if "found none" in message else 2]:
        with pytest.raises(LESSError, match=message) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    profile().save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(LESSError, match=r"cannot be written .*no space"):
        profile(shares=[[1.0, 1.0], [1.0, 1.0]]).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_measured_must_be_json(tmp_path):
    with pytest.raises(LESSError, match="expected what JSON can say"):
        profile(measured={"data": object()}).save_pretrained(tmp_path)
    assert not contents(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(LESSError, match="no such folder"):
        HeadBudgets.from_pretrained(tmp_path / "absent")
    with pytest.raises(LESSError, match=r"Head budgets 'org/tiny': .*HF_HUB_OFFLINE is set"):
        HeadBudgets.from_pretrained("org/tiny")


# Beside kernels


def test_kernels_bring_and_keep_the_profile_of_their_folder(tmp_path):
    publishable().save_pretrained(tmp_path / "one")
    assert LESSKernels.from_pretrained(tmp_path / "one").head_budgets is None
    profile().save_pretrained(tmp_path / "one")
    kernels = LESSKernels.from_pretrained(tmp_path / "one")
    assert kernels.head_budgets == profile() and kernels.head_budgets.source == str(tmp_path / "one")
    assert LESSCache.from_pretrained(tmp_path / "one", MODEL, H2O(4, 4), heads="profile").options.heads == profile()
    kernels.save_pretrained(tmp_path / "two")
    assert set(contents(tmp_path / "two")) == {CONFIG_NAME, WEIGHTS_NAME, BUDGETS_NAME}
    publishable(seed=1).save_pretrained(tmp_path / "two")  # they have none, the folder keeps its own
    assert LESSKernels.from_pretrained(tmp_path / "two").head_budgets == profile()


UNEQUAL = {
    "layers": ({"shares": [[1.0, 1.0]], "layers": [0]}, r"layers \[0\] and \[0, 1\]"),
    "heads": ({"shares": [[1.0], [1.0]]}, "KV heads 1 and 2"),
    "weights": ({"base_model_fingerprint": "0" * 64}, "base_model_fingerprint 0000"),
}


@pytest.mark.parametrize("changes, message", UNEQUAL.values(), ids=UNEQUAL)
def test_kernels_and_a_profile_of_different_models(changes, message, tmp_path):
    """Whichever comes first, nothing is written; a folder that holds both is refused."""
    other = profile(**changes)
    message = f"the head budgets and the kernels are for different models: {message}"
    publishable().save_pretrained(tmp_path / "kernels")
    other.save_pretrained(tmp_path / "profile")
    before = contents(tmp_path / "kernels"), contents(tmp_path / "profile")
    for save in (
        lambda: other.save_pretrained(tmp_path / "kernels"),
        lambda: publishable().save_pretrained(tmp_path / "profile"),
        lambda: beside(publishable(), other).save_pretrained(tmp_path / "kernels"),
    ):
        with pytest.raises(LESSError, match=message):
            save()
    assert (contents(tmp_path / "kernels"), contents(tmp_path / "profile")) == before
    (tmp_path / "kernels" / BUDGETS_NAME).write_bytes(before[1][BUDGETS_NAME])
    for use in (LESSKernels.from_pretrained, lambda folder: publish.contents(folder, REPO)):
        with pytest.raises(LESSError, match=message):
            use(tmp_path / "kernels")


def test_a_profile_that_names_no_weights(tmp_path):
    publishable().save_pretrained(tmp_path)
    profile(base_model_fingerprint=None).save_pretrained(tmp_path)
    assert LESSKernels.from_pretrained(tmp_path).head_budgets.base_model_fingerprint is None


def test_the_catalogue_s_profile(tmp_path, monkeypatch):
    beside(publishable()).save_pretrained(tmp_path / "tiny-h2o")
    entry = {"fingerprint": fingerprint(MODEL), "folder": "tiny-h2o", "repo_id": None}
    (tmp_path / "catalogue.json").write_text(json.dumps({"org/tiny": [entry]}))
    monkeypatch.setattr(catalogue, "PATHS", (tmp_path / "catalogue.json",))
    assert LESSCache.for_model(MODEL, budget=8, heads="profile").options.heads == profile()
    assert LESSCache.for_model(MODEL, budget=8, static=True).options.heads == profile()
    assert LESSCache.for_model(MODEL, budget=8).options.heads == "equal"


# On the Hub


def test_a_push_has_the_profile_and_a_load_brings_it(hub):
    beside(publishable()).push_to_hub(REPO, token=OWNER_TOKEN)
    assert set(hub.repositories[REPO].files) == PUBLISHED | {BUDGETS_NAME, ".gitattributes"}
    card = hub.repositories[REPO].files["README.md"].decode()
    assert f"`{BUDGETS_NAME}`: what each KV head keeps, 0.50 to 1.50 of the mean, measured on prose.txt." in card
    assert 'heads="profile"' in card
    assert LESSKernels.from_pretrained(REPO).head_budgets == profile()
    assert HeadBudgets.from_pretrained(REPO) == profile()
    hub.log.clear()
    LESSKernels.from_pretrained(REPO)
    assert not hub.requests("GET .*/resolve/.*"), "all of it is in the cache"


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "alone"])
def test_what_was_downloaded_serves_offline(hub, kernels, monkeypatch, tmp_path):
    profile().save_pretrained(tmp_path / "folder")
    if kernels:
        beside(publishable()).save_pretrained(tmp_path / "folder")
    hub.create(REPO, contents(tmp_path / "folder"))
    loads = [HeadBudgets.from_pretrained] + [lambda repo_id: LESSKernels.from_pretrained(repo_id).head_budgets] * kernels
    assert all(load(REPO) == profile() for load in loads)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert all(load(REPO) == profile() for load in loads)


@pytest.mark.parametrize(
    "texts, said", [(["a", "b", "c"], "measured on a, b, c."), (["a"] * 4, "measured on 4 texts."), ([], "mean.")]
)
def test_a_card_says_what_it_was_measured_on(texts, said, tmp_path):
    beside(publishable(), profile(measured={"data": texts})).save_pretrained(tmp_path)
    card = publish.companions(tmp_path, publishable().config, REPO)["README.md"].decode()
    assert f"0.50 to 1.50 of the {said if said == 'mean.' else f'mean, {said}'}" in card


def test_a_repository_without_a_profile(hub, tmp_path):
    publishable().save_pretrained(tmp_path / "folder")
    hub.create(REPO, contents(tmp_path / "folder"))
    assert LESSKernels.from_pretrained(REPO).head_budgets is None
    assert not hub.requests(f".*{BUDGETS_NAME}")
    with pytest.raises(LESSError, match=f"Head budgets '{REPO}': the repository has no {BUDGETS_NAME}"):
        HeadBudgets.from_pretrained(REPO)


def test_revisions(hub, tmp_path):
    beside(publishable()).save_pretrained(tmp_path / "folder")
    repository = hub.create(REPO, contents(tmp_path / "folder"))
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({**contents(tmp_path / "folder"), BUDGETS_NAME: profile(shares=[[1.0, 1.0]] * 2).to_json().encode()})
    assert HeadBudgets.from_pretrained(REPO, revision="v1") == profile()
    assert HeadBudgets.from_pretrained(REPO) == profile(shares=[[1.0, 1.0]] * 2)
    with pytest.raises(LESSError, match=r"expected revision to be a branch"):
        HeadBudgets.from_pretrained(REPO, revision="../v1")
    with pytest.raises(LESSError, match="Expected no revision with a local folder"):
        HeadBudgets.from_pretrained(tmp_path / "folder", revision="v1")


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "alone"])
def test_a_bad_commit_takes_no_good_ones_place(hub, kernels, monkeypatch, tmp_path):
    profile().save_pretrained(tmp_path / "folder")
    if kernels:
        beside(publishable()).save_pretrained(tmp_path / "folder")
    repository = hub.create(REPO, contents(tmp_path / "folder"))
    assert HeadBudgets.from_pretrained(REPO) == profile()
    repository.commit({**contents(tmp_path / "folder"), BUDGETS_NAME: b"{}"})
    with pytest.raises(LESSError, match="an entry is missing"):
        HeadBudgets.from_pretrained(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert HeadBudgets.from_pretrained(REPO) == profile()


def test_a_damaged_transfer(hub, tmp_path):
    profile().save_pretrained(tmp_path / "folder")
    hub.create(REPO, contents(tmp_path / "folder"))
    other = b"0" * len(profile().to_json())
    with hub.failing(f"GET .*{BUDGETS_NAME}", content=other), pytest.raises(LESSError, match="damaged in the transfer"):
        HeadBudgets.from_pretrained(REPO)
    assert HeadBudgets.from_pretrained(REPO) == profile()


def test_of_kernels_whose_config_says_otherwise(tmp_path):
    """The check is of what the files say now."""
    beside(publishable()).save_pretrained(tmp_path)
    change_config(tmp_path, base_model_fingerprint="1" * 64)
    with pytest.raises(LESSError, match="different models: base_model_fingerprint"):
        LESSKernels.from_pretrained(tmp_path)


def test_a_process_has_the_shares_of_its_heads(monkeypatch):
    """Under tensor parallelism, in order; and what are shares of another model's heads is said."""
    setup = Setup(H2O(2, 2), None, format_of("float"), torch.tensor([0.5, 1.5, 0.7, 1.3]))
    device = torch.device("cpu")
    with pytest.raises(LESSError, match="shares of the budget for 2 KV heads"):
        setup.on(device, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    own = setup.on(device, 2)
    assert torch.equal(own.shares, torch.tensor([0.7, 1.3])) and own.on(device, 2).shares is not None
    with pytest.raises(LESSError, match="shares of the budget for 3 KV heads"):
        setup.on(device, 3)
