"""The tutorial's program for LMDeploy 0.1's TurboMind, with another import line.

python examples/turbomind.py WORKSPACE_OR_CHECKPOINT
"""

import sys

from tritonmind import turbomind as tm

# load model
tm_model = tm.TurboMind.from_pretrained(sys.argv[1])
generator = tm_model.create_instance()

# process query
query = "你好啊兄嘚"
prompt = tm_model.model.get_prompt(query)
input_ids = tm_model.tokenizer.encode(prompt)

# inference
for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids], request_output_len=32):
    res, tokens = outputs[0]

response = tm_model.tokenizer.decode(res.tolist())
print(response)
tm_model.close()
