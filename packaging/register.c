// Registers ggml-squeeze in a program that has it and ggml linked in: when the first backend is made, hence after ggml's own
// backends are registered and before any context. Linked with -Wl,--wrap=ggml_backend_dev_init, which leads every call of that
// function here; ggml_backend_init_by_type, _by_name and _best call it too.
#include <pthread.h>
#include <squeeze.h>

typedef struct ggml_backend * ggml_backend_t;
typedef struct ggml_backend_device * ggml_backend_dev_t;

ggml_backend_t __real_ggml_backend_dev_init(ggml_backend_dev_t device, const char * params);
ggml_backend_t __wrap_ggml_backend_dev_init(ggml_backend_dev_t device, const char * params);

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void register_squeeze(void) {
    // A refusal has been printed, and the program goes on without us.
    (void)sqz_register();
}

ggml_backend_t __wrap_ggml_backend_dev_init(ggml_backend_dev_t device, const char * params) {
    pthread_once(&once, register_squeeze);
    return __real_ggml_backend_dev_init(device, params);
}
