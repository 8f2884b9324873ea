// Devices and contexts: how many there are, what they call themselves, and which one a thread has chosen.
#include "simulator.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local char last_message[512] = "";
static _Thread_local int current_device = -1;
static bool opened[MAX_DEVICES];
// A context is only ever compared and handed back, so its address is all it needs.
static char contexts[MAX_DEVICES];

// Tells these libraries from CANN's own; ascend_simulator.is_simulated() looks for it.
int ascend_simulator_abi(void) { return 1; }

acl_status simulator_fail(acl_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_message, sizeof last_message, format, arguments);
    va_end(arguments);
    return status;
}

const char *aclGetRecentErrMsg(void) { return last_message; }

int simulator_current_device(void) { return current_device; }

static int installed_devices(void) {
    const char *text = getenv("ASCEND_SIMULATOR_DEVICES");
    int count = text ? atoi(text) : 1;
    return count < 0 ? 0 : count > MAX_DEVICES ? MAX_DEVICES : count;
}

// As CANN's runtime reads the user's choice: numbers of devices that exist, in ascending order, or no device at all.
static int device_count(void) {
    const char *chosen = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int installed = installed_devices(), count = 0;
    if (!chosen) return installed;
    for (long previous = -1;; chosen++) {
        char *end;
        long number = strtol(chosen, &end, 10);
        if (end == chosen || number <= previous || number >= installed) return 0;
        count++, previous = number, chosen = end;
        if (*chosen == '\0') return count;
        if (*chosen != ',') return 0;
    }
}

acl_status aclrtGetDeviceCount(uint32_t *count) {
    *count = (uint32_t)device_count();
    return ACL_OK;
}

acl_status aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= device_count())
        return simulator_fail(ACL_INVALID_DEVICE, "ascend simulator: device %d of %d", device, device_count());
    current_device = device;
    opened[device] = true;
    return ACL_OK;
}

// A thread that has chosen no device has no context, and torch_npu relies on hearing so.
acl_status aclrtGetDevice(int32_t *device) {
    if (current_device < 0) return ACL_NO_CONTEXT;
    *device = current_device;
    return ACL_OK;
}

acl_status aclrtResetDevice(int32_t device) {
    if (device >= 0 && device < MAX_DEVICES) opened[device] = false;
    return ACL_OK;
}

acl_status aclrtGetCurrentContext(void **context) {
    if (current_device < 0) return ACL_NO_CONTEXT;
    *context = &contexts[current_device];
    return ACL_OK;
}

acl_status aclrtSetCurrentContext(void *context) {
    const char *chosen = context;
    if (chosen < contexts || chosen >= contexts + MAX_DEVICES)
        return simulator_fail(ACL_INVALID_PARAMETER, "ascend simulator: %p is no context", context);
    current_device = (int)(chosen - contexts);
    return ACL_OK;
}

acl_status aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (device < 0 || device >= device_count()) return ACL_INVALID_DEVICE;
    if (flags) *flags = 0;
    *active = opened[device];
    return ACL_OK;
}

const char *aclrtGetSocName(void) {
    const char *name = getenv("ASCEND_SIMULATOR_SOC_NAME");
    return name ? name : "Ascend910B2";
}

// The only numbers torch_npu asks for here are counts of cores; those of a 910B2.
acl_status aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) {
    (void)device, (void)kind;
    *value = 24;
    return ACL_OK;
}

acl_status aclrtGetDeviceInfo(uint32_t device, int kind, int64_t *value) {
    return aclGetDeviceCapability(device, kind, value);
}

acl_status aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return ACL_OK;
}
