// Functions for which doing nothing and reporting success is right, because nothing here is asynchronous, compiled,
// dumped, profiled or logged. Callers pass arguments that a C function without parameters never looks at.
#include "simulator.h"

#define INERT(name) \
    acl_status name(void) { return ACL_OK; }

// Life cycle.
INERT(aclInit)
INERT(aclFinalize)
INERT(aclAppLog)
INERT(aclrtGetLastError)
INERT(aclrtPeekAtLastError)

// Waiting: everything is complete already.
INERT(aclrtSynchronizeDevice)
INERT(aclrtSynchronizeDeviceWithTimeout)
INERT(aclrtSynchronizeStream)
INERT(aclrtSynchronizeStreamWithTimeout)
INERT(aclrtSynchronizeEvent)
INERT(aclrtStreamWaitEvent)
INERT(aclrtResetEvent)
INERT(aclrtSubscribeReport)
INERT(aclrtUnSubscribeReport)
INERT(aclrtProcessReport)

// Settings without an effect on host memory.
INERT(aclrtDeviceEnablePeerAccess)
INERT(aclrtDeviceGetBareTgid)
INERT(aclrtSetDeviceSatMode)
INERT(aclrtSetStreamFailureMode)
INERT(aclrtSetStreamOverflowSwitch)
INERT(aclrtSetOpExecuteTimeOut)
INERT(aclrtSetOpWaitTimeout)
INERT(rtGetC2cCtrlAddr)

// Descriptions of operators and tensors: only aclopCompileAndExecute would read them, and it refuses.
INERT(aclCreateTensorDesc)
INERT(aclDestroyTensorDesc)
INERT(aclGetTensorDescDimV2)
INERT(aclGetTensorDescFormat)
INERT(aclGetTensorDescNumDims)
INERT(aclGetTensorDescType)
INERT(aclSetTensorDescName)
INERT(aclSetTensorFormat)
INERT(aclSetTensorPlaceMent)
INERT(aclSetTensorShape)
INERT(aclopCreateAttr)
INERT(aclopDestroyAttr)
INERT(aclopSetAttrBool)
INERT(aclopSetAttrDataType)
INERT(aclopSetAttrFloat)
INERT(aclopSetAttrInt)
INERT(aclopSetAttrListBool)
INERT(aclopSetAttrListFloat)
INERT(aclopSetAttrListInt)
INERT(aclopSetAttrListListInt)
INERT(aclopSetAttrString)
INERT(aclrtBinaryGetFunction)
INERT(aclrtBinaryLoadFromData)
INERT(aclrtGetFunctionAddr)
INERT(rtDevBinaryRegister)
INERT(rtFunctionRegister)

// Dumps and the profiler.
INERT(aclmdlInitDump)
INERT(aclmdlSetDump)
INERT(aclmdlFinalizeDump)
INERT(MsprofGetHashId)
INERT(MsprofRegisterCallback)
INERT(MsprofReportAdditionalInfo)
INERT(MsprofReportApi)
INERT(MsprofReportCompactInfo)
INERT(MsprofSysCycleTime)
