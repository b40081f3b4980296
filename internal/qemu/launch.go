package qemu

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/qemu/qmp"
)

// greetingLimit bounds a process's way from exec to its first answer. 18 to 47
// ms are usual; a host under load takes seconds.
const greetingLimit = 20 * time.Second

// watched are the events that package qemu acts on.
var watched = []string{"SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR"}

// running is a launched machine with what is connected to it. An adopted one
// has nothing connected yet.
type running struct {
	process domain.Process
	handle  *handle
	qmp     *qmp.Client
	events  *qmp.Subscription
	console net.Conn
}

// discard ends a machine that was never handed out, and removes its run
// directory.
func (r *running) discard() error {
	if r.qmp != nil {
		r.qmp.Close()
	}
	if r.console != nil {
		r.console.Close()
	}
	if r.handle != nil {
		ctx, cancel := context.WithTimeout(context.Background(), killLimit)
		defer cancel()
		err := endProcess(ctx, r.handle)
		r.handle.close()
		if err != nil {
			return err // the directory must outlive the process
		}
	}
	return runDir(r.process.RunDir).remove()
}

// launch starts one QEMU and lets its guest go. l holds the run directory, the
// accelerator and whether the disk is scratch; the rest is filled in here. On an
// error nothing is left.
func (o *Owner) launch(ctx context.Context, build Build, spec domain.MachineSpec, l Launch) (_ *running, err error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	dir := runDir(l.RunDir)
	r := &running{process: domain.Process{
		BootID: boot,
		RunDir: l.RunDir,
		Accel:  l.Accel,
		Endpoint: domain.Endpoint{
			Kind:   spec.Link,
			Socket: dir.path(agentSocket),
			CID:    spec.CID,
		},
	}}
	if spec.Link == domain.LinkVsock {
		r.process.Endpoint.Key = make([]byte, 16)
		rand.Read(r.process.Endpoint.Key)
	}
	if err := dir.make(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.discard())
		}
	}()

	in, err := o.inherit(dir, spec, &l)
	defer in.close() // QEMU has its own
	if err != nil {
		return nil, err
	}
	// Connected before the process exists: nothing it says can be missed.
	if r.console, err = (&net.Dialer{}).DialContext(ctx, "unix", dir.path(consoleSocket)); err != nil {
		return nil, err
	}
	l.TBSizeMiB = o.opts.TBSizeMiB
	if l.Accel == TCG {
		l.TSCkHz = o.accel.tsc()
	}
	args, err := Args(spec, l)
	if err != nil {
		return nil, err
	}
	var groups []uint32
	if l.Accel == KVM && spec.UID != 0 {
		groups = kvmGroups(kvmDevice)
	}
	r.handle, err = spawn(append([]string{build.Path}, args...), in.files, spec.UID, groups)
	if err != nil {
		return nil, err
	}
	in.close()
	r.process.PID = r.handle.pid
	if err := dir.writePID(r.handle.pid); err != nil {
		return nil, err
	}
	confine(r.handle.pid)
	if r.process.StartTicks, err = startTicks(r.handle.pid); err != nil {
		return nil, refused(err, r.handle, dir, spec)
	}
	if err := r.begin(ctx); err != nil {
		return nil, refused(err, r.handle, dir, spec)
	}
	return r, nil
}

// begin negotiates with QEMU and lets the guest go.
func (r *running) begin(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, greetingLimit)
	defer cancel()
	r.qmp, err = qmp.Dial(ctx, runDir(r.process.RunDir).path(qmpSocket), qmp.Options{Timeout: greetingLimit})
	if err != nil {
		return err
	}
	r.events = r.qmp.Subscribe(16, watched...)
	if err := awaitConsole(ctx, r.qmp); err != nil {
		return err
	}
	return r.qmp.Do(ctx, "cont", nil, nil)
}

// awaitConsole returns once QEMU has accepted the connection to its console: it
// drops what is printed before.
func awaitConsole(ctx context.Context, c *qmp.Client) error {
	for {
		var chardevs []struct {
			Label    string `json:"label"`
			Filename string `json:"filename"`
		}
		if err := c.Do(ctx, "query-chardev", nil, &chardevs); err != nil {
			return err
		}
		for _, d := range chardevs {
			if d.Label == "console" && !strings.HasPrefix(d.Filename, "disconnected:") {
				return nil
			}
		}
		select {
		case <-time.After(time.Millisecond): // QEMU accepts between two commands
		case <-ctx.Done():
			return fmt.Errorf("await console: %w", ctx.Err())
		}
	}
}

// inherited are the descriptors of one child.
type inherited struct {
	files []*os.File
}

func (in *inherited) close() {
	for _, f := range in.files {
		_ = f.Close() // sockets, a log nobody has written to, devices
	}
	in.files = nil
}

func (in *inherited) add(f *os.File, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	in.files = append(in.files, f)
	return len(in.files) - 1, nil
}

// inherit opens what QEMU is given as descriptors and writes their numbers into
// l. What it returns is to be closed also when there is an error.
func (o *Owner) inherit(dir runDir, spec domain.MachineSpec, l *Launch) (*inherited, error) {
	in := &inherited{}
	if _, err := in.add(os.Open(os.DevNull)); err != nil {
		return in, err
	}
	for range 2 { // standard output and error
		if _, err := in.add(dir.openLog()); err != nil {
			return in, err
		}
	}
	var err error
	for _, s := range []struct {
		name string
		fd   *int
	}{{qmpSocket, &l.QMP}, {consoleSocket, &l.Console}, {agentSocket, &l.Agent}} {
		if *s.fd, err = in.add(dir.listen(s.name)); err != nil {
			return in, err
		}
	}
	if spec.Slot.Driver == "bridge" {
		if l.TAP, err = in.add(openTAP(spec.Slot.TAP)); err != nil {
			return in, err
		}
	}
	if spec.Link == domain.LinkVsock {
		f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
		if err != nil {
			return in, fault.New(fault.Missing, "open the host's vsock device: %w", err).
				WithNext("Load the module (modprobe vhost_vsock) and see that the daemon may open /dev/vhost-vsock, or set vm.link to serial.")
		}
		l.Vsock, _ = in.add(f, nil)
	}
	return in, nil
}

// openTAP opens the existing TAP interface name as QEMU expects it. The open
// call alone would make a new interface where there is none.
func openTAP(name string) (*os.File, error) {
	if _, err := net.InterfaceByName(name); err != nil {
		return nil, fmt.Errorf("open TAP %s: %w", name, err)
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open TAP %s: %w", name, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, ifr)
		runtime.KeepAlive(f)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open TAP %s: %w", name, err)
	}
	return f, nil
}

// refused explains why a process that was started did not come to run its
// guest. Its own words, where it has left any, are the best explanation.
func refused(err error, h *handle, dir runDir, spec domain.MachineSpec) error {
	words := dir.lastWords()
	if !h.ended() && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		// The connection can end a moment before the process does.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if endWait(ctx, h) {
			words = dir.lastWords()
		}
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	f := &fault.Error{Kind: fault.BootFailed, Next: "Run `agentiso doctor`.", Err: err}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		f.Kind = fault.Timeout
		f.Msg = "QEMU does not answer on its control socket" + after(words)
		f.Next = "See whether the host is overloaded, and try again."
	case words == "":
		f.Msg = "QEMU ended before it answered: " + err.Error()
	default:
		f.Msg = "QEMU refused to start: " + option.ReplaceAllString(words, "")
		for _, k := range refusals {
			if strings.Contains(words, k.says) {
				f.Kind, f.Next = k.kind, k.next(spec)
				break
			}
		}
	}
	return f
}

// option is the argument that QEMU repeats before a complaint about it.
var option = regexp.MustCompile(`^-(blockdev|drive|device|netdev|chardev|object|accel|M) \S+: `)

func after(words string) string {
	if words == "" {
		return ""
	}
	return "; it said: " + words
}

// endWait waits for the process's end until ctx is done, leaving h open.
func endWait(ctx context.Context, h *handle) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !h.ended() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// refusals are QEMU's common complaints: what their text contains (7.2 and
// later), and what they mean to the user. The first that fits counts.
var refusals = []struct {
	says string
	kind fault.Kind
	next func(domain.MachineSpec) string
}{
	{"KVM kernel module", fault.Missing, func(domain.MachineSpec) string {
		return "Set vm.accel to auto or tcg, or see that QEMU's user may open /dev/kvm (on Debian and Ubuntu the group kvm may)."
	}},
	{"Failed to get", fault.InUse, func(s domain.MachineSpec) string { // … "write" lock
		return fmt.Sprintf("Another process has %s open; end it (fuser -v shows it), and try again.", s.Disk.Path)
	}},
	{"Permission denied", fault.Missing, func(s domain.MachineSpec) string {
		who := "the daemon's user"
		if s.UID != 0 {
			who = fmt.Sprintf("the machine's user (uid %d)", s.UID)
		}
		return "See that " + who + " may read kernel, initrd and images and may reach them through all their directories."
	}},
	{"No such file", fault.Missing, func(domain.MachineSpec) string {
		return "A file of the workspace or of its image is gone; restore it, or destroy the workspace."
	}},
	{"Cannot allocate memory", fault.NoSpace, func(s domain.MachineSpec) string {
		return fmt.Sprintf("The host has no %d MiB of memory left; stop another workspace or ask for less.", s.MemoryMiB)
	}},
	{"No space left", fault.NoSpace, func(domain.MachineSpec) string { return "Free some space on the host's disk." }},
}
