// Operators that torch_npu launches itself. Kernels are replaced above, in the dispatcher, so one that arrives here is
// a gap: it is refused by name. The exceptions are the two that ProcessGroupHCCL launches from C++.
#include "simulator.h"

#include <stdlib.h>
#include <string.h>

struct buffer {
    void *data;
    size_t size;
};

void *aclCreateDataBuffer(void *data, size_t size) {
    struct buffer *buffer = malloc(sizeof *buffer);
    if (buffer) *buffer = (struct buffer){data, size};
    return buffer;
}

acl_status aclDestroyDataBuffer(void *buffer) {
    free(buffer);
    return ACL_OK;
}

static acl_status refuse(const char *name) {
    return simulator_fail(ACL_OP_REFUSED, "ascend simulator: operator %s reached the device; it has no stand-in", name);
}

// Repeats inputs[1]'s bytes over the output.
static acl_status fill(const struct buffer *value, struct buffer *output) {
    if (value->size == 0 || output->size % value->size != 0) return refuse("Fill");
    for (size_t i = 0; i < output->size; i += value->size) memcpy((char *)output->data + i, value->data, value->size);
    return ACL_OK;
}

// One-dimensional padding at the end, with zeros.
static acl_status pad(const struct buffer *input, struct buffer *output) {
    if (output->size < input->size) return refuse("PadV3");
    memcpy(output->data, input->data, input->size);
    memset((char *)output->data + input->size, 0, output->size - input->size);
    return ACL_OK;
}

// ACL passes more arguments after the outputs; none of them matters to the two operators.
acl_status aclopCompileAndExecute(const char *name, int num_inputs, void **input_descs, struct buffer **inputs,
                                  int num_outputs, void **output_descs, struct buffer **outputs) {
    (void)input_descs, (void)output_descs;
    if (!strcmp(name, "Fill") && num_inputs == 2 && num_outputs == 1) return fill(inputs[1], outputs[0]);
    if (!strcmp(name, "PadV3") && num_inputs >= 1 && num_outputs == 1) return pad(inputs[0], outputs[0]);
    return refuse(name);
}

acl_status aclopCompileAndExecuteV2(const char *name) { return refuse(name); }

acl_status rtKernelLaunch(void) { return refuse("(a compiled kernel)"); }

// "No package of that name": torch_npu then asks nothing that depends on CANN's version.
acl_status aclsysGetCANNVersion(int package, void *version) {
    (void)package, (void)version;
    return ACL_INTERNAL_ERROR;
}
