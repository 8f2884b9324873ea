// What the stand-ins share. Signatures follow CANN's public headers; parameters that a synchronous device over host
// memory has no use for are taken and dropped.
#ifndef ASCEND_SIMULATOR_H
#define ASCEND_SIMULATOR_H

#include <stddef.h>
#include <stdint.h>

typedef int32_t acl_status;

// ACL's own error numbers: torch_npu tells some of them apart (no context yet, out of memory).
enum {
    ACL_OK = 0,
    ACL_INVALID_DEVICE = 107001,
    ACL_NO_CONTEXT = 107002,
    ACL_INVALID_PARAMETER = 107000,
    ACL_FEATURE_NOT_SUPPORTED = 207000,
    ACL_OUT_OF_MEMORY = 207001,
    ACL_INTERNAL_ERROR = 500000,
    ACL_OP_REFUSED = 500001,
};

enum { MAX_DEVICES = 16 };

// Keeps a message for aclGetRecentErrMsg, which torch_npu puts into the exception, and returns `status`.
acl_status simulator_fail(acl_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The calling thread's device, or -1 before it has chosen one.
int simulator_current_device(void);

const char *aclrtGetSocName(void);

#endif
