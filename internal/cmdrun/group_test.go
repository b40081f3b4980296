package cmdrun

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// firstLine hands over the first line written to it.
type firstLine struct {
	b   strings.Builder
	got chan string
}

func (f *firstLine) Write(p []byte) (int, error) {
	f.b.Write(p)
	if line, _, ok := strings.Cut(f.b.String(), "\n"); ok {
		select {
		case f.got <- line:
		default:
		}
	}
	return len(p), nil
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// zombie reports whether pid is dead but not reaped: its new parent's business.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && strings.Contains(string(b), ") Z ")
}
