"""Several answers at once over one connection, with asyncio.

python examples/triton_asyncio.py [HOST:PORT]    (needs tritonclient[grpc])
"""

import asyncio
import sys

import numpy as np
import tritonclient.grpc.aio as grpc
from tritonclient.grpc import InferInput

TEXTS = ["The capital of France is", "The largest ocean is", "Water boils at"]


def request(number, text):
    inputs = [InferInput("text_input", [1], "BYTES"), InferInput("stream", [1], "BOOL")]
    inputs[0].set_data_from_numpy(np.array([text], dtype=object))
    inputs[1].set_data_from_numpy(np.array([True]))
    return {
        "model_name": "tritonmind",
        "inputs": inputs,
        "request_id": str(number),
        "parameters": {"temperature": 0, "max_tokens": 16},
    }


async def requests():
    for number, text in enumerate(TEXTS):
        yield request(number, text)


async def main(address):
    texts, num_running = list(TEXTS), len(TEXTS)
    async with grpc.InferenceServerClient(address) as client:
        responses = client.stream_infer(requests())
        async for result, error in responses:
            if error is not None:
                raise error
            response = result.get_response()
            texts[int(response.id)] += result.as_numpy("text_output")[0].decode()
            num_running -= response.parameters["triton_final_response"].bool_param
            if not num_running:
                responses.cancel()
                break
    print("\n".join(texts))


asyncio.run(main(sys.argv[1] if sys.argv[1:] else "127.0.0.1:33337"))
