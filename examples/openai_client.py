"""OpenAI's client against the API server: a stream, an answer by a schema, and log-probabilities.

python examples/openai_client.py [URL]    (needs openai; the server: tritonmind serve api_server ./workspace)
"""

import json
import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1] if sys.argv[1:] else 'http://127.0.0.1:23333'}/v1", api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=24,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Where is the Eiffel Tower?"}],
    max_tokens=64,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
)
print("city:", json.loads(answer.choices[0].message.content)["city"])

completion = client.completions.create(
    model=model, prompt="One, two,", max_tokens=4, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
)
logprobs = completion.choices[0].logprobs
for token, logprob in zip(logprobs.tokens, logprobs.token_logprobs, strict=True):
    print(f"{token!r}: {logprob:.2f}")
