"""Publishing: what a push sends, what a card says, and that a failure leaves the repository as it was."""

import errno
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from hub_server import OWNER_TOKEN, STRANGER_TOKEN
from huggingface_hub import ModelCard, constants
from test_hub_client import Terminal
from test_hub_files import change_config, small_kernels

from less_cache import LESSError, LESSKernels
from less_cache.hub import card, publish
from less_cache.kernels.folder import CONFIG_NAME, WEIGHTS_NAME

REPO = "owner/kernels"
PUBLISHED = {CONFIG_NAME, WEIGHTS_NAME, "README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}


def row(cache: str, perplexity: float, held: float, recent: int = 20) -> dict:
    policy = None if cache == "full" else {"name": "h2o", "heavy": 19, "recent": recent}
    gap = {"baseline+": 0.13, "less": 0.5}.get(cache)
    return {"cache": cache, "policy": policy, "perplexity": perplexity, "bytes": held, "gap_recovered": gap}


REPORT = {
    "data": ["prose.txt"],
    "sequences": 16,
    "prompt_length": 512,
    "decoded": 128,
    "less_cache": "0.1.0",
    "results": [[row("full", 20.0, 29e6), row("policy", 33.0, 1e6), row("baseline+", 32.0, 2e6, 25), row("less", 27.0, 2e6)]],
}


def publishable(seed: int = 0, **changes) -> LESSKernels:
    kernels = small_kernels(seed)
    kernels.config.base_model = "org/tiny"
    kernels.config.policy = {"name": "h2o", "heavy": 0.25, "recent": 8}
    kernels.config.training = {"data": ["prose.txt"], "prompts": [128, 512]}
    kernels.config.metrics = {"prose": REPORT}
    for name, value in changes.items():
        setattr(kernels.config, name, value)
    return kernels


# Push


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_pushed_comes_back(hub, dtype):
    address = publishable().push_to_hub(REPO, token=OWNER_TOKEN, license="apache-2.0", dtype=dtype)
    assert address.startswith(f"{hub.endpoint}/{REPO}/commit/")
    loaded = LESSKernels.from_pretrained(REPO)
    for name, tensor in publishable().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
    assert loaded.config.metrics == {"prose": REPORT}


def test_sizes_by_layer_are_published(hub):
    kernels = small_kernels(rank=[2, 6], hidden_size=[4, 4])
    kernels.config.base_model = "org/tiny"
    kernels.push_to_hub(REPO, token=OWNER_TOKEN)
    loaded = LESSKernels.from_pretrained(REPO)
    assert loaded.config.rank == [2, 6] and loaded.config.hidden_size == 4
    for name, tensor in kernels.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert "R = 2 to 6 by layer, hidden size 4, 2 layers" in hub.repositories[REPO].files["README.md"].decode()


def test_a_push_is_one_commit_of_known_files(hub, tmp_path):
    publishable().save_pretrained(tmp_path / "kernels")
    (tmp_path / "kernels" / "secret.txt").write_text("mine")
    (tmp_path / "kernels" / "checkpoint.pt").write_text("mine")
    publish.push(tmp_path / "kernels", REPO, token=OWNER_TOKEN)
    assert len(hub.repositories[REPO].commits) == 2  # the first one made it
    assert set(hub.repositories[REPO].files) == PUBLISHED | {".gitattributes"}


def test_push_to_a_branch_and_to_a_private_repository(hub):
    publishable().push_to_hub(REPO, token=OWNER_TOKEN, private=True)
    repository = hub.repositories[REPO]
    assert repository.private
    repository.refs["dev"] = repository.refs["main"]
    publishable(seed=1).push_to_hub(REPO, token=OWNER_TOKEN, revision="dev")
    assert repository.refs["dev"] != repository.refs["main"]
    with pytest.raises(LESSError, match="the repository has no such revision"):
        publishable().push_to_hub(REPO, token=OWNER_TOKEN, revision="absent")


FAILURES = {
    "no token": ({}, None, "does not know the token"),
    "unknown token": ({}, "hf_wrong", "does not know the token"),
    "other account": ({}, STRANGER_TOKEN, "the token does not allow this"),
    "rate limit": ({"request": ".*/commit/.*", "status": 429}, OWNER_TOKEN, "too many requests"),
    "broken": ({"request": ".*/preupload/.*", "status": 500}, OWNER_TOKEN, r"a problem of its own \(500\)"),
    "storage broken": ({"request": "PUT .*", "status": 503}, OWNER_TOKEN, r"a problem of its own \(503\)"),
    "commit broken": ({"request": ".*/commit/.*", "status": 500}, OWNER_TOKEN, r"a problem of its own \(500\)"),
    "cut": ({"request": "PUT .*", "cut_at": 0}, OWNER_TOKEN, "the connection broke"),
    "no answer": ({"request": ".*/preupload/.*", "hang": True}, OWNER_TOKEN, "the connection broke"),
    "no answer to the card": ({"request": ".*/resolve/.*", "hang": True}, OWNER_TOKEN, "the connection broke"),
    "storage without answer": ({"request": "PUT .*", "hang": True}, OWNER_TOKEN, "the connection broke"),
    "commit without answer": ({"request": ".*/commit/.*", "hang": True}, OWNER_TOKEN, "the connection broke"),
    "card refused": ({"request": ".*/validate-yaml", "status": 400}, OWNER_TOKEN, "Push to 'owner/kernels'"),
}


@pytest.mark.parametrize("failure, token, message", FAILURES.values(), ids=FAILURES)
def test_a_failed_push_changes_nothing(hub, failure, token, message):
    publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    before = dict(hub.repositories[REPO].commits)
    with hub.failing(**{"request": "none", **failure}), pytest.raises(LESSError, match=message) as caught:
        publishable(seed=1).push_to_hub(REPO, token=token)
    assert "\n" not in str(caught.value)
    assert hub.repositories[REPO].commits == before
    publishable(seed=1).push_to_hub(REPO, token=OWNER_TOKEN)
    assert len(hub.repositories[REPO].commits) == len(before) + 1


def test_a_push_whose_answer_is_lost(hub):
    """Whether the commit arrived, nobody knows; the error does not claim that it did not."""
    with (
        hub.failing(".*/commit/.*", cut_at=0),
        pytest.raises(LESSError, match="is as it was, or has all of the commit") as caught,
    ):
        publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    assert "Nothing was changed" not in str(caught.value)
    assert set(hub.repositories[REPO].files) == PUBLISHED | {".gitattributes"}


def test_no_push_while_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LESSError, match=r"HF_HUB_OFFLINE is set\. Unset it"):
        publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    assert not hub.log


def test_a_full_disk_at_a_push(hub, monkeypatch):
    def write(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(LESSError, match=r"cannot write to the disk .*No space left.* TMPDIR"):
        publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    assert not hub.repositories


@pytest.mark.parametrize("own, used", [(None, 0.5), (7.0, 7.0)])
def test_time_outs(hub, own, used):
    """A user's own stay; without one, no request of a push waits for ever; and afterwards the client is as it was."""
    session, asked = huggingface_hub.get_session(), []
    session.timeout = own
    session.event_hooks = {"request": [*session.event_hooks["request"], lambda request: asked.append(request.extensions)]}
    before = session.event_hooks
    publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    waits = {request["timeout"]["read"] for request in asked}  # some of the client's own calls have a time-out of theirs
    assert len(asked) > 5 and used in waits and None not in waits
    assert session.event_hooks == before


def test_progress_is_shown(hub, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    assert WEIGHTS_NAME in sys.stderr.getvalue() and "100%" in sys.stderr.getvalue()


@pytest.mark.parametrize("base_model", [None, "/somewhere/local", "./local", "tiny"])
def test_a_base_model_without_hub_id_is_not_published(hub, base_model):
    """A card needs it, and a local path is nobody's business."""
    with pytest.raises(LESSError, match="expected the config's base_model to be a Hub id"):
        publishable(base_model=base_model).push_to_hub(REPO, token=OWNER_TOKEN)
    assert not hub.repositories


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "README.md", card.PLOT_NAME])
def test_a_link_out_of_the_folder_is_not_published(hub, tmp_path, name):
    folder = tmp_path / "kernels"
    publishable().save_pretrained(folder)
    (tmp_path / "secret").write_bytes((folder / WEIGHTS_NAME).read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(LESSError, match="a symbolic link out of the folder"):
        publish.push(folder, REPO, token=OWNER_TOKEN)
    assert not hub.repositories


def test_the_repository_s_own_text_stays(hub):
    publishable().push_to_hub(REPO, token=OWNER_TOKEN, license="mit")
    repository = hub.repositories[REPO]
    edited = repository.files["README.md"].decode().replace("library_name", "language: de\nlibrary_name")
    repository.commit({**repository.files, "README.md": (edited + "\n## My notes\n\nUnique.\n").encode()})
    publishable(seed=1, rank=2).push_to_hub(REPO, token=OWNER_TOKEN)
    text = repository.files["README.md"].decode()
    assert text.count("## My notes\n\nUnique.") == text.count(card.BEGIN) == text.count("# LESS kernels") == 1
    assert ModelCard(text).data.license == "mit" and ModelCard(text).data.language == "de"


# Card


def render(**options) -> str:
    kernels = options.pop("kernels", publishable())
    kernels.config.sha256 = "0" * 64
    return card.render(kernels.config, REPO, "float32, 1.0 MB", **options)


def test_card_is_valid_by_the_hub_s_own_validation(hub):
    if huggingface_hub.__version__ < "2":
        pytest.skip("the old client validates on the public Hub only")
    ModelCard(render(license="apache-2.0")).validate()
    for wrong in (
        "base_model: /local",
        "tags: [5]",
        "model-index: [{name: a, results: [{task: {type: b}}]}]",
        "license: [mit]",
    ):
        with pytest.raises(ValueError):
            ModelCard(f"---\n{wrong}\n---\n").validate()
    assert hub.requests("POST /api/validate-yaml")


def test_card_s_metadata():
    data = ModelCard(render(license="apache-2.0")).data
    fingerprint = publishable().config.base_model_fingerprint
    assert (data.base_model, data.library_name, data.license) == ("org/tiny", "less-cache", "apache-2.0")
    assert data.tags == ["kv-cache", f"less-fingerprint-{fingerprint[:16]}"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("prose", "perplexity", 27.0)


def test_card_s_text():
    text = render(plot=True)
    assert f'LESSCache.from_pretrained("{REPO}", model)' in text
    assert f'custom_generate="{REPO}", trust_remote_code=True, less_budget=128' in text
    assert "| less | heavy 19, recent 20 | 2.00 | 27.00 | 50% |" in text
    command = "--budget 39 --sequences 16 --prompt-length 512 --decoded 128"
    assert command in text and "--dtype" not in text
    kernels = publishable()
    kernels.config.metrics = {"prose": {**REPORT, "dtype": "bfloat16"}}
    assert f"{command} --dtype bfloat16" in render(kernels=kernels)
    assert "perplexity.png" in text and "perplexity.png" not in render()
    assert "prompts: [128, 512]" in text


def test_card_of_bare_kernels():
    """Without metrics, policy or training there is less to say."""
    text = render(kernels=publishable(metrics={"note": "by hand"}, policy=None, training={}))
    assert f'LESSCache.from_pretrained("{REPO}", model, policy=H2O(' in text and "custom_generate" not in text
    assert "Measured" not in text and "Trained" not in text and ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("count", ["many", [64], None, True, {"heavy": 1}], ids=str)
def test_a_policy_that_cannot_be_shown(count):
    with pytest.raises(LESSError, match="Card: expected the config's policy to be a name and its counts, got"):
        card.render(publishable(policy={"name": "h2o", "heavy": count}).config, "owner/kernels", "float32, 0.0 MB")


def test_card_written_again_is_the_same():
    text = render(license="mit")
    assert render(previous=text) == text


def test_new_measurements_replace_the_old():
    older = render()
    better = json.loads(json.dumps(REPORT).replace("27.0", "26.0"))
    text = render(kernels=publishable(metrics={"prose": better}), previous=older)
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == 26.0 and "27.0" not in text
    assert "model-index" not in render(kernels=publishable(metrics={}), previous=older)


OLDER = {
    "text around": (f"Before.\n\n{card.BEGIN}\nold\n{card.END}\n\nAfter.", {"Before.", "After."}),
    "text alone": ("My text.", {"My text."}),
    "backslashes": (rf"\1 \g<0> {card.BEGIN}" + f"\n{card.END}", {r"\1 \g<0>"}),
}


@pytest.mark.parametrize("older, kept", OLDER.values(), ids=OLDER)
def test_text_of_one_s_own_stays(older, kept):
    text = render(previous=f"---\ntags:\n- mine\n- less-fingerprint-old\npipeline_tag: text-generation\n---\n{older}")
    assert all(text.count(words) == 1 for words in kept) and "old\n" not in text.split("---")[2]
    data = ModelCard(text).data
    assert data.tags[:2] == ["mine", "kv-cache"] and "less-fingerprint-old" not in data.tags
    assert data.pipeline_tag == "text-generation"


@pytest.mark.parametrize("older", ["---\na: [\n---\n", "---\n- a list\n---\n"])
def test_an_older_card_that_cannot_be_read(older):
    with pytest.raises(LESSError, match="older card"):
        render(previous=older)


# custom_generate


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """transformers asks the environment whether less-cache is installed, and copies the code that it runs."""
    metadata = tmp_path / "site" / "less_cache-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: less-cache\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(metadata.parents[1]))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("published", [False, True], ids=["folder", "repository"])
def test_custom_generate(hub, installed, tmp_path, published):
    from less_cache import H2O, LESSCache

    model = tiny.tiny_llama()
    kernels = publishable()
    kernels.save_pretrained(tmp_path / "kernels")
    for name, content in publish.contents(tmp_path / "kernels", REPO).items():
        (tmp_path / "kernels" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kernels" / name).write_bytes(content)
    kernels.push_to_hub(REPO, token=OWNER_TOKEN)
    where = REPO if published else str(tmp_path / "kernels")

    inputs = {"input_ids": torch.arange(3, 43)[None], "max_new_tokens": 20, "do_sample": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    cache = LESSCache(model, policy=H2O.from_budget(8), kernels=kernels)
    expected = model.generate(**inputs, past_key_values=cache)
    got = model.generate(**inputs, custom_generate=where, trust_remote_code=True, less_budget=8)
    assert torch.equal(got, expected)
    assert not torch.equal(got, model.generate(**inputs)), "a budget of 8 tokens makes a difference"
    with pytest.raises(LESSError, match="makes a cache of its own"):
        model.generate(**inputs, custom_generate=where, trust_remote_code=True, past_key_values=cache)


def test_no_code_without_trust(hub, installed, tmp_path):
    """Loading kernels runs nothing; transformers' own switch is the only way."""
    trace = tmp_path / "trace"
    publishable().push_to_hub(REPO, token=OWNER_TOKEN)
    code = f"open({str(trace)!r}, 'w')\ndef generate(**options): pass\n".encode()
    hub.repositories[REPO].commit({**hub.repositories[REPO].files, "custom_generate/generate.py": code, "setup.py": code})
    LESSKernels.from_pretrained(REPO)
    with pytest.raises(ValueError, match="trust_remote_code"):
        tiny.tiny_llama().generate(torch.ones(1, 3, dtype=torch.long), custom_generate=REPO, trust_remote_code=False)
    assert not trace.exists() and not hub.requests("GET .*generate.py")


def test_pushed_config_is_what_the_folder_s_config_says(hub, tmp_path):
    folder = tmp_path / "kernels"
    publishable().save_pretrained(folder)
    change_config(folder, sha256="0" * 64)
    with pytest.raises(LESSError, match=r"expected sha256 0{64}"):
        publish.push(folder, REPO, token=OWNER_TOKEN)
    assert json.loads((folder / CONFIG_NAME).read_text())["sha256"] == "0" * 64 and not hub.repositories
