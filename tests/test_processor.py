import pytest

from gptjax.machine import processor


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu sse2 avx2 amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: a processor that tells nothing", False),
    ],
)
def test_processors_with_bfloat16_matmuls_are_recognised(tmp_path, monkeypatch, line, known):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor.multiplies_bfloat16() == known
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "nothing")
    assert not processor.multiplies_bfloat16()
