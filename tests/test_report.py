"""The report of a run: the numbers of the page are those of the run, and nothing that users made can act in it."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.report import charts, html
from gptjax.report.events import add_event, read_events
from gptjax.report.page import asset, json_for_html
from gptjax.report.record import names_of, read_record, read_samples
from tests.faults.inputs import refused
from tests.tiny import CONFIG, replace

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">&<!--"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def write_run(folder: Path, steps: int = 20, config: Config = CONFIG, sample: str = "\nfoo", loss=lambda n: 4 - n / 10):
    """A run directory as training leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    rows = []
    for n in range(1, steps + 1):
        row = {"step": n, "loss": loss(n), "learning_rate": 1e-3, "grad_norm": 1.0, "skipped": 0}
        rows.append(row | {"tokens": n * 128, "tokens_per_s": 1000.0})
        if n % 10 == 0:
            rows.append({"step": n, "val_loss": loss(n) + 0.5, "perplexity": 20.0})
    rows.insert(5, {"step": 5, "skip": {"reason": "the loss is a spike", "loss": 9.0, "grad_norm": 2.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "samples.txt").write_text(f"--- step 10\n{sample}\n--- step 20\n{sample}\n", encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The elements of a page, its text, and its data."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._script = Counter(), [], "", None
        self.scripts: list[str] = []
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        self._script = tag == "script"

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data


def test_the_page_has_the_numbers_of_the_run(tmp_path):
    run = write_run(tmp_path / "one")
    add_event(run, "start", 0, flops_per_token=100.0, peak_flops=1e6, facts=[["device", "1 x imagined"]])
    add_event(run, "resume", 12, facts=[["device", "2 x imagined"]], flops_per_token=100.0, peak_flops=1e6)
    page = Page(html.render([read_record(run)]))
    [steps] = [page.data["runs"][0]["steps"]]
    assert steps["step"] == list(range(1, 21)) and steps["loss"] == [round(4 - n / 10, 5) for n in range(1, 21)]
    assert steps["mfu"] == [0.1] * 20, "tokens/s times FLOPs of a token over the peak"
    assert page.data["runs"][0]["evaluations"] == {
        "step": [10, 20],
        "val_loss": [3.5, 2.5],
        "perplexity": [20.0, 20.0],
        "tokens": [1280, 2560],
    }
    titles = [chart["title"] for chart in page.data["charts"]]
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Throughput", "MFU", "Perplexity"], (
        "skipped is constant"
    )
    assert {mark["step"] for mark in page.data["marks"]} == {5, 12}
    for shown in ("2.5000", "optim.learning_rate", "0.003", "2 x imagined", "the loss is a spike", "20 of 20", "foo"):
        assert shown in page.text, shown
    assert "1 x imagined" not in page.text, "the newest start counts"


def test_several_runs_are_told_apart(tmp_path):
    one = write_run(tmp_path / "a" / "run")
    other = write_run(tmp_path / "b" / "run", config=replace(CONFIG, optim={"beta2": 0.5}), loss=lambda n: 3.0)
    names = names_of([one, other])
    assert names == [str(one), str(other)], "folders of the same name are named in full"
    page = Page(html.render([read_record(path, name) for path, name in zip((one, other), names, strict=True)]))
    assert [run["name"] for run in page.data["runs"]] == names
    assert [series["run"] for series in page.data["charts"][0]["series"]] == [0, 1, 0, 1]
    assert "optim.beta2" in page.text and "optim.beta1" not in page.text


def test_nothing_that_users_made_becomes_part_of_the_page(tmp_path):
    def rendered(word: str, folder: str) -> Page:
        prompt = replace(CONFIG, train={"sample_prompt": word}, data={"path": (word,)}, init_from=word)
        run = write_run(tmp_path / folder, sample=word + word, config=prompt)
        rows = (run / "metrics.jsonl").read_text().replace("perplexity", word.replace('"', '\\"'))
        (run / "metrics.jsonl").write_text(rows)
        add_event(run, "start", 0, facts=[[word, word]], versions={word: word}, flops_per_token=word, peak_flops=word)
        add_event(run, word, 3, reason=word)
        records = [read_record(run, word), read_record(run, word + "2")]
        return Page(html.render(records[:1]) + html.render(records))

    harmless, hostile = rendered("word", "harmless"), rendered(HOSTILE, "hostile")
    assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
    assert hostile.scripts[1] == harmless.scripts[1] and len(hostile.scripts) == 4
    assert HOSTILE in hostile.text and hostile.data["runs"][0]["name"] == HOSTILE


def test_data_in_a_page_has_no_signs_of_html():
    text = json_for_html({HOSTILE: [HOSTILE, math.nan]})
    assert not set("<>&") & set(text) and json.loads(text) == {HOSTILE: [HOSTILE, None]}


def test_scripts_make_text_only_as_text():
    for name in ("dom.js", "report.js", "inspect.js"):
        code = asset(name).replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|http", code), name


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.slow
def test_a_browser_draws_every_chart_and_runs_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", sample=HOSTILE)
    (run / "report.html").write_text(html.render([read_record(run, HOSTILE)]), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}", (run / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("<figure") == 5 and len(re.findall(r'<path d="M[^"]*L', shown)) == 6
    assert "<title>hacked" not in shown


def test_a_long_run_keeps_its_lowest_and_highest_losses(tmp_path):
    spikes = {7003: 50.0, 9001: -3.0}
    run = write_run(tmp_path / "long", 12_000, loss=lambda n: spikes.get(n, 2 + math.sin(n / 500)))
    record = read_record(run)
    kept = charts.thin(record.steps)
    assert len(kept) <= charts.MOST_POINTS and [row["step"] for row in kept] == sorted({row["step"] for row in kept})
    assert kept[0]["step"] == 1 and kept[-1]["step"] == 12_000
    assert {row["step"] for row in kept} >= set(spikes)
    assert "of 12,000 logged steps" in html.render([record])


def test_gaps_damage_and_repeats_are_told(tmp_path):
    run = write_run(tmp_path / "run", loss=lambda n: None if n == 3 else 1.0)
    add_event(run, "start", 0, value=math.nan)
    with open(run / "events.jsonl", "ab") as file:
        file.write(b'{"time": 1\n[3]\n')
    assert read_events(run)[1] == 2 and read_events(run)[0][0]["value"] is None
    page = html.render([read_record(run)])
    assert "2 lines of events.jsonl could not be read" in page
    assert Page(page).data["runs"][0]["steps"]["loss"][2] is None
    (run / "samples.txt").write_text("--- step 3\nold\n--- step 6\nx\n--- step 3\nnew\nline\n")
    assert read_samples(run / "samples.txt") == [(3, "new\nline"), (6, "x")], "made again after a resume"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"step": 1, "tokens": "x", "loss": 1, "tokens_per_s": 1}'),
        ("metrics.jsonl", '{"step": 1, "by_layer": {"grad_norm": [1, 2]}}'),
        ("events.jsonl", '{"event": "start", "step": 0, "time": 1, "facts": [1]}'),
        ("events.jsonl", '{"event": "start", "step": 0, "time": 1, "versions": []}'),
    ],
)
def test_a_value_of_a_wrong_kind_is_one_line(tmp_path, capsys, file, line):
    run = write_run(tmp_path / "run")
    (run / file).write_text(line + "\n")
    assert "run: has a value of a wrong kind: " in refused(capsys, "report", run)
    assert not (run / "report.html").exists()


def test_the_verb_writes_page_and_figures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "runs" / "a$b$"), write_run(tmp_path / "runs" / "other")
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    assert main(["report", str(one), str(other), "--png", "figures"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["comparison.html", "figures/loss.png"]
    assert (tmp_path / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err
    assert main(["report"]) == 2
    for out, message in (("config.yaml", "must end in .html"), ("nowhere/a.html", "cannot be written: No such file")):
        before = (one / "config.yaml").read_bytes()
        assert message in refused(capsys, "report", one, "--out", one / out)
        assert (one / "config.yaml").read_bytes() == before and not (one / "nowhere").exists()
    (one / "metrics.jsonl").unlink()
    assert main(["report", str(one)]) == 2
    assert "no metrics.jsonl yet" in capsys.readouterr().err
