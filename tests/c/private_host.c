/* A host that loads llama.cpp for itself alone (RTLD_LOCAL, as Python's ctypes and Node's addons do): the plugin must find ggml
 * all the same. Arguments: libllama.so, the folder of ggml's backends, the plugin. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

static void *find(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "%s\n", dlerror());
    }
    return found;
}

int main(int argc, char **argv) {
    void *llama, *plugin;
    void (*load)(const char *);
    void *(*init)(void);
    if (argc != 4) {
        return 2;
    }
    llama = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    plugin = dlopen(argv[3], RTLD_NOW | RTLD_LOCAL);
    if (!llama || !plugin) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    *(void **)&load = find(llama, "ggml_backend_load_all_from_path");
    *(void **)&init = find(plugin, "ggml_backend_init");
    if (!load || !init) {
        return 2;
    }
    load(argv[2]);
    return init() ? 0 : 1;
}
