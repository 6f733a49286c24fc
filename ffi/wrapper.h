// What bindgen reads: the ggml headers whose structures the plugin walks or patches, and a pointer type `<name>_fn` for
// every function that it looks up by name at run time, held against the header's own declaration.
#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#define FUNCTION(ret, name, ...)           \
    typedef ret (*name##_fn)(__VA_ARGS__); \
    _Static_assert(__builtin_types_compatible_p(name##_fn, __typeof__(&name)), #name " has another type in ggml's header")

FUNCTION(const char *, ggml_version, void);
FUNCTION(const char *, ggml_op_name, enum ggml_op);
FUNCTION(size_t, ggml_type_size, enum ggml_type);
FUNCTION(size_t, ggml_tensor_overhead, void);
FUNCTION(size_t, ggml_backend_dev_count, void);
FUNCTION(ggml_backend_dev_t, ggml_backend_dev_get, size_t);
FUNCTION(const char *, ggml_backend_dev_name, ggml_backend_dev_t);
FUNCTION(enum ggml_backend_dev_type, ggml_backend_dev_type, ggml_backend_dev_t);
FUNCTION(bool, ggml_backend_buffer_is_host, ggml_backend_buffer_t);
FUNCTION(void, ggml_backend_tensor_get, const struct ggml_tensor *, void *, size_t, size_t);
FUNCTION(struct ggml_tensor *, ggml_custom_4d, struct ggml_context *, enum ggml_type, int64_t, int64_t, int64_t, int64_t,
         struct ggml_tensor **, int, ggml_custom_op_t, int, void *);
FUNCTION(struct ggml_tensor *, ggml_flash_attn_ext, struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *,
         struct ggml_tensor *, struct ggml_tensor *, float, float, float);
