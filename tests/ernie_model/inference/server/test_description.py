"""The server does what its own description says: schemathesis calls every route by it, rightly and wrongly.

More of it:  SCHEMATHESIS_EXAMPLES=2000 python -m pytest tests/ernie_model/inference/server/test_description.py
"""

import os

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ernie_model.config import ErnieConfig
from ernie_model.inference.server.app import make_app
from ernie_model.inference.server.settings import ServerSettings
from ernie_model.inference.tools import ToolBox, zoom_tool
from ernie_model.processor import Processor
from ernie_model.tokenizer import load_tiny_tokenizer
from tests.ernie_model.inference.scripted import ScriptedEngine

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "15"))


def make():
    tokenizer = load_tiny_tokenizer()
    config = ErnieConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
    )
    processor = Processor(tokenizer, config)
    engine = ScriptedEngine(tokenizer, lambda prompt: "Good morning.")
    settings = ServerSettings(
        name="tiny", keys=("a-key",), toolbox=ToolBox([zoom_tool()])
    )  # for requests without tools
    return make_app(engine, processor, settings)


schema = schemathesis.openapi.from_asgi("/openapi.json", make())


@schema.parametrize()
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
def test_every_route_keeps_its_word(case):
    case.headers["Authorization"] = "Bearer a-key"
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # a name made up would end every request early
    # Its schema cannot say where an address leads, or that a result answers a call: rightly formed may be refused.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
