// Which calls of a driver fail, for a test that loads it: one, or every one from there on.

static int calls, fail_at, fail_code, fail_on;
static const char * failed = "";

// Call number `at` from now on fails with `code`; with `on` all behind it do too.
void made_up_fail(int at, int code, int on) {
    calls = 0;
    fail_at = at;
    fail_code = code;
    fail_on = on;
}
int made_up_calls(void) { return calls; }

// The function whose call failed last.
const char * made_up_failed(void) { return failed; }

static int answer_of(const char * name) {
    int call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    if (!fail_at || (call != fail_at && !(fail_on && call > fail_at))) return 0;
    failed = name;
    return fail_code;
}
