"""llama.cpp's own server on a port, until it is told to end; run by the interpreter that has xllamacpp.

    python llama_cpp_server.py PORT THREADS SLOTS TOKENS_A_SLOT MODEL [ADAPTER ...]

Adapters are loaded and not applied: a request says how much of which it wants.
"""

import os
import signal
import sys

import xllamacpp

port, threads, slots, context = (int(value) for value in sys.argv[1:5])
model, *adapters = sys.argv[5:]
params = xllamacpp.CommonParams()
params.model.path = model
params.hostnames = ["127.0.0.1"]
params.port = port
params.n_parallel = slots
params.n_ctx = slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
print(xllamacpp.get_system_info(), flush=True)
server = xllamacpp.Server(params)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.pause()
