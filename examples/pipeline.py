"""Answers, a stream, a conversation and asyncio, from a model in a process of its own.

python examples/pipeline.py WORKSPACE_OR_CHECKPOINT
"""

import asyncio
import sys

from tritonmind import SamplingParams, pipeline


async def ask_at_once(pipe, params):
    """Two questions beside each other, without a thread for each."""
    return await asyncio.gather(
        pipe.infer_async("What is the capital of France?", params), pipe.infer_async("Name one river.", params)
    )


# The engine's process imports this file's modules, not this file: no `if __name__ == "__main__"` is needed.
params = SamplingParams(max_tokens=24, temperature=0)
with pipeline(sys.argv[1]) as pipe:
    for answer in pipe(["What is the capital of France?", "Name three rivers."], params):
        print(f"answer: {answer.text!r} ({answer.finish_reason})")

    print("stream: ", end="")
    for delta in pipe.stream("Tell me a story.", params):
        print(delta.text, end="", flush=True)
    print()

    talk = pipe.chat("My name is Ada.", gen_config=params)
    talk = pipe.chat("What is my name?", talk, params)
    for message in talk.messages:
        print(f"{message['role']}: {message['content']!r}")

    for answer in asyncio.run(ask_at_once(pipe, params)):
        print(f"at once: {answer.text!r}")
