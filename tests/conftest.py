"""Offline, seeded, derandomised by default; the tiny models as fixtures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import huggingface_hub
import pytest
import tiny
import torch
from hub_server import HubServer
from huggingface_hub import constants
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # drawing is cheap here, running is not
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30, suppress_health_check=SLOW)
settings.register_profile("dev", deadline=None, max_examples=200, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Needs a triton that interprets kernels: test_fused.py runs it in a process of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["fused_cases.py"]

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """The real model first: of several processes the first one gets all of its tests, and no other loads it."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """Factory: `tiny_llama(attn_implementation="sdpa", seed=0, **overrides)`, see `tiny.tiny_llama`."""
    return tiny.tiny_llama


@pytest.fixture
def tiny_kernels():
    """Factory: `tiny_kernels(model, rank=8, hidden_size=16, seed=0)`, see `tiny.tiny_kernels`."""
    return tiny.tiny_kernels


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `hub_server.HubServer`; this process is its client, with an empty cache, no token and no patience."""
    with HubServer() as server:
        values = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": "/absent/token",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_ETAG_TIMEOUT": 0.5,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.5,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.file_download, "_ETAG_RETRY_TIMEOUT", 0.2)
        monkeypatch.setattr("less_cache.hub.client.PATIENCE", 0.5)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        huggingface_hub.close_session()
