// The Ascend Transformer Boost library, which torch_npu links for inference operators: present, and refusing.
#include "simulator.h"

#define REFUSED(name) \
    acl_status name(void) { return simulator_fail(ACL_OP_REFUSED, "ascend simulator: atb has no stand-in"); }

// C++ names as the linker sees them: atb::CreateContext, atb::DestroyContext, atb::CreateOperation<…>, …
REFUSED(_ZN3atb13CreateContextEPPNS_7ContextE)
REFUSED(_ZN3atb14DestroyContextEPNS_7ContextE)
REFUSED(_ZN3atb15CreateOperationINS_5infer11LinearParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer12ElewiseParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer12RmsNormParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer14GroupTopkParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer18SelfAttentionParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer19PagedAttentionParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer20ReshapeAndCacheParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb15CreateOperationINS_5infer9RopeParamEEEiRKT_PPNS_9OperationE)
REFUSED(_ZN3atb16DestroyOperationEPNS_9OperationE)
REFUSED(_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE)
