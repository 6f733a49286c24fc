// A program that links the installed library. It has no ggml, so registration must refuse: with a code and a sentence, and
// without ending the program.
#include <squeeze.h>
#include <stdio.h>

int main(void) {
    struct sqz_stats stats;
    stats.size = sizeof(stats);
    if (sqz_abi_version() != SQZ_ABI_VERSION || sqz_get_stats(NULL, &stats) != SQZ_OK || stats.nodes_sparse != 0) {
        printf("header and library do not fit: %s\n", sqz_last_error());
        return 1;
    }
    enum sqz_status status = sqz_register();
    printf("version %s, status %d: %s\n", sqz_version(), (int)status, sqz_last_error());
    return status != SQZ_ERROR_HOST;
}
