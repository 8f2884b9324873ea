// Options: only kept, so that reading one back gives what was set. Nothing here is compiled or nondeterministic.
#include "simulator.h"

#include <stdio.h>
#include <string.h>

// System options, by number.
enum { NUM_SYSTEM_OPTIONS = 16 };
static int64_t system_options[NUM_SYSTEM_OPTIONS];

acl_status aclrtSetSysParamOpt(int option, int64_t value) {
    if (option < 0 || option >= NUM_SYSTEM_OPTIONS) return ACL_INVALID_PARAMETER;
    system_options[option] = value;
    return ACL_OK;
}

acl_status aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

acl_status aclrtGetSysParamOpt(int option, int64_t *value) {
    if (option < 0 || option >= NUM_SYSTEM_OPTIONS) return ACL_INVALID_PARAMETER;
    *value = system_options[option];
    return ACL_OK;
}

// Compile options, as text: aclCompileOpt.
enum { JIT_COMPILE = 10, NUM_COMPILE_OPTIONS = 32, OPTION_BYTES = 256 };
static char compile_options[NUM_COMPILE_OPTIONS][OPTION_BYTES];

// torch_npu asks what the chip prefers. It chooses layers' weight formats by the answer: the first generation compiles
// kernels for each shape, later ones bring theirs along.
static const char *preferred_jit_compile(void) {
    static const char *const first_generation[] = {"Ascend910A", "Ascend910Pro", "Ascend910Premium"};
    const char *name = aclrtGetSocName();
    for (size_t i = 0; i < sizeof first_generation / sizeof *first_generation; i++)
        if (!strncmp(name, first_generation[i], strlen(first_generation[i]))) return "enable";
    return "disable";
}

acl_status aclSetCompileopt(int option, const char *value) {
    if (option < 0 || option >= NUM_COMPILE_OPTIONS) return ACL_INVALID_PARAMETER;
    snprintf(compile_options[option], OPTION_BYTES, "%s", value);
    return ACL_OK;
}

acl_status aclGetCompileopt(int option, char *value, size_t size) {
    if (option < 0 || option >= NUM_COMPILE_OPTIONS) return ACL_INVALID_PARAMETER;
    const char *kept = compile_options[option];
    snprintf(value, size, "%s", option == JIT_COMPILE && !*kept ? preferred_jit_compile() : kept);
    return ACL_OK;
}

size_t aclGetCompileoptSize(int option) {
    (void)option;
    return OPTION_BYTES;
}
