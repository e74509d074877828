"""What a published folder holds beside the kernels, and the way to the Hub."""

from pathlib import Path

from less_cache.hub import card, client
from less_cache.kernels import folder as files
from less_cache.kernels.config import LESSConfig
from less_cache.kernels.head_budgets import BUDGETS_NAME, HeadBudgets

CARD_NAME = "README.md"
CUSTOM_GENERATE = Path(__file__).parent / "custom_generate"
CUSTOM_GENERATE_NAMES = ("generate.py", "requirements.txt")


def companions(
    folder: Path,
    config: LESSConfig,
    name: str,
    previous: str | None = None,
    license: str | None = None,
    plot: bool = False,
) -> dict[str, bytes]:
    """The card and `custom_generate/` for the kernels in `folder`, by file name.

    Args:
        folder: Holds the kernels.
        config: What the card says of them.
        name: What `from_pretrained` will be given: a repository id, or the folder.
        previous: An older card whose own text is kept. Default: the folder's.
        license: Of the base model. Default: the older card's.
        plot: Whether the card shows `perplexity.png`.
    """
    if previous is None and (folder / CARD_NAME).is_file():
        previous = files.locate(folder, CARD_NAME).read_text(encoding="utf-8")
    text = card.render(config, name, files.describe(folder), previous, license, plot, HeadBudgets.of(folder))
    code = {f"custom_generate/{part}": (CUSTOM_GENERATE / part).read_bytes() for part in CUSTOM_GENERATE_NAMES}
    return {**code, CARD_NAME: text.encode()}


def contents(folder: Path, repo_id: str, previous: str | None = None, license: str | None = None) -> dict[str, bytes]:
    """All that a push sends, by file name; nothing else of the folder ever leaves it."""
    config = files.read_config(folder)
    files.check_digest(folder, config)
    budgets, plot = HeadBudgets.of(folder), (folder / card.PLOT_NAME).exists()
    names = [files.WEIGHTS_NAME, files.CONFIG_NAME, *([card.PLOT_NAME] if plot else [])]
    if budgets is not None:
        budgets.check_beside(config, str(folder))
        names.append(BUDGETS_NAME)
    sent = {name: files.locate(folder, name).read_bytes() for name in names}
    return {**sent, **companions(folder, config, repo_id, previous, license, plot)}


def push(
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    license: str | None = None,
) -> str:
    """Upload kernels with their card in one commit; the commit's address. Without a card of the folder's own, the text
    of the repository's is kept.
    """
    previous = None if (folder / CARD_NAME).is_file() else client.read_card(repo_id, revision, token)
    return client.upload(repo_id, contents(folder, repo_id, previous, license), revision, token, private)
