import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_snippets_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert (tmp_path / "pipeline.joblib").is_file()
    assert names["search"].best_params_.keys() == {"dim__local_weight", "dim__global_weight", "dim__prior_weight"}
    assert names["pipeline"].score(names["X_test"], names["y_test"]) > 0.85


def test_links_and_pictures_are_there():
    text = (ROOT / "README.md").read_text()
    paths = [ROOT / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert {"learned.png", "CONTRIBUTING.md", "SECURITY.md"} <= {path.name for path in paths}
    assert all(path.exists() for path in paths)
    assert all(path.stat().st_size < 200_000 for path in paths if path.suffix == ".png")


def test_recipes_train():
    names = {}
    for block in [BLOCKS[0], next(block for block in BLOCKS if "paper_local" in block)]:
        exec(block, names)
    for recipe in (names["stride1"], names["paper_local"], names["paper_global"]):
        Z = recipe.set_params(max_epochs=1, random_state=0).fit(names["X"][:64]).transform(names["X"][:4])
        assert Z.shape == (4, 64)
