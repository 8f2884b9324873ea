"""On the path of programs that import MindSpeed without CANN: torchair, which it needs to register its graph-mode ops.

torch_npu's own torchair does not load without CANN's graph engine, which the simulator lacks; nothing here uses graphs.
It must be there before torch_npu is, which therefore takes it instead of its own.
"""

import sys
from types import ModuleType

graph_engine = ModuleType("torchair.ge")
graph_engine.Tensor = graph_engine.TensorSpec = graph_engine.DataType = object
torchair = ModuleType("torchair")
torchair.ge = graph_engine
torchair.register_fx_node_ge_converter = lambda op: lambda converter: converter
sys.modules |= {"torchair": torchair, "torchair.ge": graph_engine}
