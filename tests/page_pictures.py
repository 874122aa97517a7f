"""The pictures of the page in docs/images, with a scripted answer: `python -m tests.page_pictures docs/images`."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.browser import Chat, chromium, page_of
from tests.fake_transport import FakeTransport
from tritonmind_tools.console_transport import Delta, Message, Status

QUESTION = "What does softmax do? With a table, some code and a formula, please."
ANSWER = """**Softmax** turns scores into probabilities: the larger a score, the larger its share.

$$\\sigma(x)_i = \\frac{e^{x_i}}{\\sum_j e^{x_j}}$$

| score \\(x_i\\) | \\(e^{x_i}\\) | share |
|---:|---:|---:|
| 2.0 | 7.39 | 66 % |
| 1.0 | 2.72 | 24 % |
| 0.1 | 1.11 | 10 % |

```python
def softmax(x):
    e = np.exp(x - x.max())  # cannot overflow
    return e / e.sum()
```
"""
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}


class Example(FakeTransport):
    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Generator[Delta, None, None]:
        for start in range(0, len(ANSWER), 4):
            yield Delta(text=ANSWER[start : start + 4], num_tokens=1, num_input_tokens=34, num_cached_tokens=0)
            self._cancelled.wait(0.01)
        yield Delta(finish_reason="stop")

    def connect(self) -> Example:
        return Example()

    def status(self) -> Status:
        return Status(is_ready=True, text="tritonmind, Triton server localhost:33337")


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {"light": DESKTOP, "dark": DESKTOP | {"color_scheme": "dark"}, "phone": PHONE}
    with chromium() as browser, page_of(Example()) as served:
        for name, settings in pictures.items():
            chat = Chat.open(browser, served.url, **settings)
            chat.ask(QUESTION)
            chat.expect_answer("cannot overflow")
            chat.expect(".tm-note", "stop")
            if name == "dark":
                chat.set(system="Be brief.", temperature="0.7")
            chat.page.wait_for_timeout(1500)
            path = directory / f"gradio-{name}.png"
            chat.page.screenshot(path=path, caret="hide", animations="disabled")
            chat.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
