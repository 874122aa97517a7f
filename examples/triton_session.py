"""A session of two turns over gRPC: the server keeps the history, a request brings the new turn only.

python examples/triton_session.py [HOST:PORT]    (needs tritonclient[grpc])
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpc

SESSION_ID = 20


def tensor(name, value, datatype):
    found = grpc.InferInput(name, [1], datatype)
    found.set_data_from_numpy(
        np.array([value], dtype=object if datatype == "BYTES" else grpc.triton_to_np_dtype(datatype))
    )
    return found


def ask(client, answers, text, **session):
    """Stream the answer to `text`."""
    inputs = [
        tensor("messages", json.dumps([{"role": "user", "content": text}]), "BYTES"),
        tensor("stream", True, "BOOL"),
        tensor("session_id", SESSION_ID, "UINT64"),
        *(tensor(name, True, "BOOL") for name, wanted in session.items() if wanted),
    ]
    client.async_stream_infer("tritonmind", inputs, parameters={"temperature": 0, "max_tokens": 24})
    while True:
        answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        print(answer.as_numpy("text_output")[0].decode(), end="", flush=True)
        if answer.get_response().parameters["triton_final_response"].bool_param:
            return print(f"\n[{answer.as_numpy('num_cached_tokens')[0]} tokens of the prompt were cached]")


with grpc.InferenceServerClient(sys.argv[1] if sys.argv[1:] else "127.0.0.1:33337") as client:
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result))
    ask(client, answers, "My name is Ada.", sequence_start=True)
    ask(client, answers, "What is my name?", sequence_end=True)
