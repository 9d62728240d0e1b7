r"""Programs as answers: what is right, and what a hostile one cannot do."""

import json
import shutil
import time
from unittest.mock import patch

import pytest

from bae.errors import UserError
from bae.text.programs import ProgramVerifier
from bae.text.verdict import Verdict

CORRECT, WRONG, UNPARSEABLE, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT
SQUARE = json.dumps([{"call": "square(3)", "output": "9"}, {"call": "square(-2)", "output": "4"}])
ECHO = json.dumps([{"stdin": "3\n", "output": "9\n"}, {"stdin": "2", "output": "4"}])
PAIRS = json.dumps([{"call": "f()", "output": "[(1, 'a'), None]"}])
HAS_BUBBLEWRAP = shutil.which("bwrap") is not None
SANDBOXES = ["none", pytest.param("bubblewrap", marks=pytest.mark.skipif(not HAS_BUBBLEWRAP, reason="no bwrap here"))]


@pytest.fixture(scope="module", params=SANDBOXES)
def verifier(request):
    verifier = ProgramVerifier(request.param, timeout=2.0, memory_mb=256, output_kb=16)
    yield verifier
    verifier.close()


def test_what_is_right(verifier):
    right = {
        "def square(x): return x * x": SQUARE,
        "```python\ndef square(x):\n    return x ** 2\n```": SQUARE,
        "import math\nprint('noise')\nsquare = lambda x: int(math.pow(x, 2))": SQUARE,
        "print(int(input()) ** 2)": ECHO,
        "print(f'{int(input()) ** 2}  \\n')": ECHO,
        'def f(): return [(1, "a"), None]': PAIRS,
    }
    assert verifier.verify(list(right.items())) == [CORRECT] * len(right)


def test_what_is_wrong(verifier):
    wrong = {
        "def square(x): return x + x": SQUARE,
        "def square(x): return 9": SQUARE,
        "def cube(x): return x": SQUARE,
        "def square(x): return str(x * x)": SQUARE,
        "1 / 0": SQUARE,
        "print(9)": ECHO,
        "": ECHO,
        "def square(x:": SQUARE,
        "The answer is 9.": SQUARE,
    }
    verdicts = dict(zip(wrong, verifier.verify(list(wrong.items())), strict=True))
    assert [text for text, verdict in verdicts.items() if verdict is UNPARSEABLE] == [
        "", "def square(x:", "The answer is 9.",
    ]  # fmt: skip
    assert set(verdicts.values()) == {WRONG, UNPARSEABLE}


def test_programs_that_cheat_are_wrong(verifier):
    """None is told what is expected, and none ends a test by leaving."""
    cheats = [
        "class A(int):\n    def __eq__(self, other): return True\ndef square(x): return A()",
        "import sys\ndef square(x): sys.exit(0)",
        "import os\ndef square(x): os._exit(0)",
        "import sys\ndef square(x): return open(sys.argv[0]).read()",
        "def square(x): return open('/proc/self/cmdline').read()",
        "def square(x): raise SystemExit",
    ]
    assert verifier.verify([(cheat, SQUARE) for cheat in cheats]) == [WRONG] * len(cheats)


def test_programs_that_hang_or_grow_are_stopped(verifier):
    start = time.perf_counter()
    hostile = {
        "while True: pass": TIMEOUT,
        "import time\ntime.sleep(60)": TIMEOUT,
        "x = 'a' * 10**9": WRONG,
        "while True: print('a' * 1000)": WRONG,
        "(" * 5000: UNPARSEABLE,
    }
    assert verifier.verify([(program, ECHO) for program in hostile]) == list(hostile.values())
    assert time.perf_counter() - start < 40


@pytest.mark.skipif(not HAS_BUBBLEWRAP, reason="no bwrap here")
def test_a_sandbox_shows_no_file_and_no_network(tmp_path):
    (tmp_path / "secret").write_text("9")
    programs = [
        f"def square(x): return int(open({str(tmp_path / 'secret')!r}).read())",
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')\ndef square(x): return 9",
        "open('/box/answer.py', 'a')\ndef square(x): return 9",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\ndef square(x): return 9",
        "import os\nassert 'HOME' not in os.environ and os.listdir('/tmp') == []\ndef square(x): return 9",
    ]
    verifier = ProgramVerifier("bubblewrap", timeout=5.0)
    nine = json.dumps([{"call": "square(3)", "output": "9"}])
    assert verifier.verify([(program, nine) for program in programs]) == [WRONG] * 4 + [CORRECT]
    assert not (tmp_path / "new").exists()
    verifier.close()


@pytest.mark.parametrize(
    "reference",
    ["", "9", "[]", "{}", '["9"]', '[{"output": "9"}]', '[{"call": 3, "output": "9"}]',
     '[{"call": "f()", "output": "9", "stdin": ""}]'],
)  # fmt: skip
def test_bad_references_are_refused(reference):
    verifier = ProgramVerifier("none")
    assert verifier.fault(reference)
    with pytest.raises(ValueError, match="cannot be read"):
        verifier.submit([("print(1)", reference)])
    assert verifier.fault(SQUARE) is None and verifier.equivalent([("a ", "```\na\n```"), ("a", "b")]) == [True, False]


def test_a_machine_without_bubblewrap_is_told_so():
    with patch("shutil.which", return_value=None), pytest.raises(UserError, match="bwrap is not installed"):
        ProgramVerifier("bubblewrap")
    for wrong in ({"sandbox": "chroot"}, {"output_kb": 0}, {"timeout": -20.0}):
        with pytest.raises(ValueError, match="verifier"):
            ProgramVerifier(**({"sandbox": "none"} | wrong))
