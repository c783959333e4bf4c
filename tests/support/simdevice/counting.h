// What is asked of the device, counted per line of the watched package: launches, waits of the host, transfers.
#pragma once
#include <Python.h>
#include <frameobject.h>

#include <map>
#include <mutex>
#include <string>

struct Count {
    long calls = 0;
    long bytes = 0;
};

static std::mutex counting_lock;
static bool counting = false;
static std::string watched;
static std::map<std::string, Count> counts;  // "kind|file:line|operator"
static thread_local int simulating = 0;      // within an operator: what it copies is the simulation's own

struct Simulating {
    Simulating() { simulating++; }
    ~Simulating() { simulating--; }
};

// The innermost Python frame whose file has `watched` in its path.
static std::string asking_line() {
    if (!Py_IsInitialized()) return "?";
    PyGILState_STATE state = PyGILState_Ensure();
    PyFrameObject* frame = PyEval_GetFrame();
    Py_XINCREF(frame);
    std::string found = "?";
    while (frame) {
        PyCodeObject* code = PyFrame_GetCode(frame);
        const char* name = PyUnicode_AsUTF8(code->co_filename);
        std::string file = name ? name : "";
        Py_DECREF(code);
        auto at = file.rfind(watched);
        PyFrameObject* caller = nullptr;
        if (at != std::string::npos)
            found = file.substr(at + watched.size()) + ":" + std::to_string(PyFrame_GetLineNumber(frame));
        else
            caller = PyFrame_GetBack(frame);
        Py_DECREF(frame);
        frame = caller;
    }
    PyGILState_Release(state);
    return found;
}

static void note(const char* kind, const std::string& what, long bytes) {
    if (!counting || simulating) return;
    std::string key = std::string(kind) + "|" + asking_line() + "|" + what;
    std::lock_guard<std::mutex> guard(counting_lock);
    Count& count = counts[key];
    count.calls++;
    count.bytes += bytes;
}
