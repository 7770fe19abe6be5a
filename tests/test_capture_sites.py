"""The table of call sites, held against the engines' released sources: those of the wheels, in a folder that
KDA_ENGINE_SOURCES names. Without it the tests are skipped, and say how to fetch them.
"""

import ast
import re

import pytest

from kdacli.capture.sites import ENGINES, Site
from tests import engine_sources

ENGINES_HELD = ("sglang", "vllm")

# The layers that call KDA on a GPU of NVIDIA's, and what they call there beside it.
LAYERS = {
    "sglang": (
        "srt/layers/attention/linear/kda_backend.py",
        "srt/layers/attention/linear/kda_prefill_graph.py",
    ),
    "vllm": (
        "models/kimi_k3/nvidia/kda.py",
        "models/glm5next/common/kda.py",
        "model_executor/models/bailing_moe_v3.py",
        "model_executor/layers/mamba/gdn/kimi_gdn_linear_attn.py",
    ),
}
COMPUTES = re.compile(r"kda|recurrent|delta_rule|recoverssm|dispatcher\.|chain_verify")
BESIDE = re.compile(
    r"covered|_can_run|supported|^is_|^has_|^can_use|resolve|validate|config|alignment|state_(dtype|shape|copy_func)"
    r"|plan$|projection_overlap|get_workspace_size|compile|Records|effective_extend_kernel|is_nv_cutedsl|track_"
    r"|is_(flashkda|nvidia_kda|ptx_kda)|^fused_kda_gate$|_is_kda_layer|^to$|^contiguous$|KDAKernelDispatcher"
    r"|CuteRecoverSSMVerify"
)
# Calls that lead to a site: (in the layer, the function of the table).
INNER = {
    "kda_extend_in_graph": "extend",
    "_fused_chain_verify_fn": "fused_kda_conv_gating_verify",
    "_run_dspark_cutedsl_mtp": "fused_kda_decode_mtp_dspark",
    "recoverssm_verify": "__call__",
    "_recoverssm_verify": "kda_recoverssm_verify",
    "flashinfer_recurrent_kda": "_flashinfer_kda_prefill",
    "fwd": "_flashkda_prefill",
    "bailing_v3_kda_attention": "chunk_kda",  # the operator around the layer's own calls
}


def definition(engine: str, site: Site) -> ast.FunctionDef | ast.ClassDef | ast.Assign | None:
    """What the target is in the sources, also where its package only imports it."""
    module, _, function = site.target.partition(":")
    path = engine_sources.folder(engine).parent.joinpath(*module.split("."))
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        body = ast.parse(file.read_text()).body if file.is_file() else []
        found = None
        for name in function.split("."):
            found = next((node for node in body if name in names(node)), None)
            body = getattr(found, "body", [])
        if found is not None:
            return found
    return None


def names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()


@pytest.mark.parametrize("engine", ENGINES_HELD)
def test_every_site_is_where_it_should_be(engine):
    for site in ENGINES[engine]:
        found = definition(engine, site)
        assert (found is None) == bool(site.until), f"{site.target}, until {site.until!r}"
        if not isinstance(found, ast.FunctionDef):
            continue
        arguments = {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}
        told = {site.gate_if, site.logit_if, site.only_if, site.packed_qkv, *site.not_if, *site.ignored} - {""}
        if found.args.kwarg is None:
            told -= {name for name in site.ignored if name not in arguments}  # shared by several sites
            assert told <= arguments, f"{site.target} has no {told - arguments}"


@pytest.mark.parametrize("engine", ENGINES_HELD)
def test_every_call_of_the_layers_is_in_the_table(engine):
    known = {site.target.rpartition(":")[2].rpartition(".")[2] for site in ENGINES[engine] if not site.until}
    for layer in LAYERS[engine]:
        calls = [
            node
            for node in ast.walk(ast.parse((engine_sources.folder(engine) / layer).read_text()))
            if isinstance(node, ast.Call)
        ]
        called = {ast.unparse(call.func) for call in calls}
        reached = set()
        for call in filter(COMPUTES.search, called):
            name = call.rpartition(".")[2]
            if not (BESIDE.search(name) or BESIDE.search(call)):
                assert INNER.get(name, name) in known, f"{layer} calls {call}"
                reached.add(name)
        assert reached, f"{layer} calls nothing that the table knows"
