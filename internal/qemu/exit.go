package qemu

import (
	"bytes"
	"fmt"
	"strings"
	"syscall"
)

// panicWindow is how much of the console's end is searched for a panic: a
// trace is 2 to 4 KiB.
const panicWindow = 16 << 10

// exitReason puts the end of a machine into words; clean is true when the guest
// or its owner meant it. shutdown is the reason in
// QEMU's SHUTDOWN event (qapi/run-state.json, ShutdownCause), "" without one; ws
// the process's status if it was our child; console the end of what the guest
// printed, searched for a panic, because a kernel that panics resets the
// machine as one that shuts down does; words what QEMU has logged. The guest
// may lie on its console; it can only change the words.
func exitReason(shutdown string, killed bool, ws syscall.WaitStatus, ours bool, console []byte, words string) (reason string, clean bool) {
	switch shutdown {
	case "guest-shutdown":
		return "guest shut down", true
	case "guest-reset", "guest-panic":
		if p := panicLine(console); p != "" {
			return "guest kernel panic: " + p, false
		}
		if shutdown == "guest-panic" {
			return "guest kernel panic", false
		}
		return "guest shut down", true
	case "host-qmp-quit", "host-signal", "host-error":
		if !killed {
			return "stopped from the host (" + shutdown + ")" + after(words), false
		}
	case "":
	default:
		if !killed {
			return "QEMU ended: " + printable(shutdown) + after(words), false
		}
	}
	switch {
	case killed:
		return "killed", true
	case !ours:
		return "ended; how is unknown, as an earlier daemon had started it" + after(words), false
	case ws.Signaled():
		return "QEMU was killed by signal " + signalWords(ws.Signal()) + after(words), false
	case ws.ExitStatus() != 0:
		return fmt.Sprintf("QEMU exited with status %d%s", ws.ExitStatus(), after(words)), false
	}
	return "QEMU exited" + after(words), false
}

func signalWords(s syscall.Signal) string {
	switch s {
	case syscall.SIGKILL:
		return "9 (SIGKILL); the host may have run out of memory"
	case syscall.SIGSYS:
		return "31 (SIGSYS); its sandbox stopped it"
	}
	return fmt.Sprintf("%d (%v)", int(s), s)
}

// panicLine finds the text of the last kernel panic in a console's output.
func panicLine(console []byte) string {
	const says = "Kernel panic - not syncing: "
	i := bytes.LastIndex(console, []byte(says))
	if i < 0 {
		return ""
	}
	line := console[i+len(says):]
	if j := bytes.IndexByte(line, '\n'); j >= 0 {
		line = line[:j]
	}
	return strings.TrimSpace(printable(string(line[:min(len(line), 200)])))
}
