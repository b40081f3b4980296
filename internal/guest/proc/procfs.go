package proc

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// allProcesses returns the numbers of all processes of the guest.
func allProcesses() []int {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	var pids []int
	for {
		names, err := d.Readdirnames(1024)
		for _, s := range names {
			if n, err := strconv.Atoi(s); err == nil && n > 0 {
				pids = append(pids, n)
			}
		}
		if err != nil {
			return pids
		}
	}
}

// sessionOf returns pid's session and state letter; 0 if it is gone.
func sessionOf(pid int) (session int, state byte) {
	b, err := readLimited("/proc/"+strconv.Itoa(pid)+"/stat", 4<<10)
	if err != nil {
		return 0, 0
	}
	return parseStat(b)
}

// parseStat reads the session and the state from a line of /proc/PID/stat. The
// command's name in it is the process's own choice and may hold anything.
func parseStat(b []byte) (session int, state byte) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 4 || len(f[0]) != 1 {
		return 0, 0
	}
	n, err := strconv.Atoi(string(f[3]))
	if err != nil || n < 0 {
		return 0, 0
	}
	return n, f[0][0]
}

// intFile returns the number in a file of /proc or /sys; 0 if there is none.
func intFile(name string) int {
	b, err := readLimited(name, 64)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return n
}

// readLimited reads at most limit bytes. It does not wait for a writer where
// somebody has put a FIFO.
func readLimited(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// writeFile writes s to an existing file of /proc or /sys.
func writeFile(name, s string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(s)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
