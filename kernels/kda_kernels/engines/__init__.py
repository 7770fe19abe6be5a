"""Our kernels at the call sites of serving engines: what replaces what, and the entry points that engines call.

`sites` says of an engine that is installed which call sites ours fit, and why not the others; `vllm` and `sglang` hold
the tables and the entry points of the groups `vllm.general_plugins` and `sglang.srt.plugins`; `vllm_calls` and
`sglang_calls` are what runs there. Only the last two import torch.
"""
