package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const kvmDevice = "/dev/kvm"

// A Verdict says which accelerator machines get, and why.
type Verdict struct {
	Accel  string `json:"accel"`
	Reason string `json:"reason"` // what speaks for it, for people
	Next   string `json:"next"`   // what would make KVM possible; ""

	// What it holds for. A verdict that needed no probe has no kernel.
	Kernel string `json:"kernel,omitempty"` // digest
	QEMU   string `json:"qemu,omitempty"`   // Build.Key
	BootID string `json:"boot_id,omitempty"`

	CheckedAt time.Time     `json:"checked_at,omitzero"`
	Took      time.Duration `json:"took_ns,omitempty"`
}

// accel decides on the accelerator and remembers verdicts.
type accel struct {
	want string       // "auto", KVM or TCG
	path string       // of the verdicts; "" for none
	tsc  func() int64 // the host's counter in kHz, measured once

	probing chan struct{} // holds a token during a probe: one at a time

	mu       sync.Mutex
	verdicts []Verdict // of this boot of the host
}

func newAccel(opts Options) (*accel, error) {
	a := &accel{want: opts.Accel, probing: make(chan struct{}, 1), tsc: sync.OnceValue(tscKHz)}
	switch a.want {
	case "":
		a.want = "auto"
	case "auto", KVM, TCG:
	default:
		return nil, fault.New(fault.Invalid, "unknown accelerator %q", a.want).WithNext("Set vm.accel to auto, kvm or tcg.")
	}
	if opts.StateDir == "" {
		return a, nil
	}
	if err := os.MkdirAll(opts.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	a.path = filepath.Join(opts.StateDir, "accel.json")
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	a.verdicts = loadVerdicts(a.path, boot)
	return a, nil
}

// loadVerdicts reads the verdicts of this boot of the host. A file that is
// absent or damaged holds none: they can be found again.
func loadVerdicts(path, boot string) []Verdict {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	var all []Verdict
	if json.Unmarshal(b, &all) != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(v Verdict) bool {
		return v.BootID != boot || v.Accel != KVM && v.Accel != TCG
	})
}

// remember keeps v in the place of an earlier verdict on the same.
func (a *accel) remember(v Verdict) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.verdicts = slices.DeleteFunc(a.verdicts, func(w Verdict) bool { return w.Kernel == v.Kernel && w.QEMU == v.QEMU })
	a.verdicts = append(a.verdicts, v)
	if a.path == "" {
		return nil
	}
	b, err := json.MarshalIndent(a.verdicts, "", "\t")
	if err != nil {
		return err
	}
	tmp := a.path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write accelerator verdict: %w", err)
	}
	if err := os.Rename(tmp, a.path); err != nil {
		return fmt.Errorf("write accelerator verdict: %w", err)
	}
	return nil
}

func (a *accel) recall(kernel, qemu string) (Verdict, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, v := range a.verdicts {
		if v.Kernel == kernel && v.QEMU == qemu {
			return v, true
		}
	}
	return Verdict{}, false
}

// Verdicts are the accelerator verdicts that probes have reached since the host
// was booted.
func (o *Owner) Verdicts() []Verdict {
	o.accel.mu.Lock()
	defer o.accel.mu.Unlock()
	return slices.Clone(o.accel.verdicts)
}

// ForgetVerdicts makes the next machine probe anew.
func (o *Owner) ForgetVerdicts() error {
	o.accel.mu.Lock()
	defer o.accel.mu.Unlock()
	o.accel.verdicts = nil
	if o.accel.path == "" {
		return nil
	}
	if err := os.Remove(o.accel.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget accelerator verdicts: %w", err)
	}
	return nil
}

// Accel decides which accelerator the machine of spec gets: the one that spec
// or the options force, or else, for auto, KVM if a guest with spec's kernel
// and disk (which is not written to) has really come up under it since the
// host was booted. If that is not known yet it is tried, for five seconds at
// the most; others who ask meanwhile wait. A host that cannot do what is forced
// is a fault of kind missing.
func (o *Owner) Accel(ctx context.Context, spec domain.MachineSpec) (Verdict, error) {
	want := o.accel.want
	if spec.AccelForce != "" {
		want = spec.AccelForce
	}
	switch want {
	case TCG:
		return Verdict{Accel: TCG, Reason: "asked for"}, nil
	case KVM:
		if v := hostKVM(kvmDevice, spec.UID); v.Accel != KVM {
			return Verdict{}, fault.New(fault.Missing, "KVM is not usable: %s", v.Reason).WithNext("%s", v.Next)
		}
		return Verdict{Accel: KVM, Reason: "asked for"}, nil
	}
	if v := hostKVM(kvmDevice, spec.UID); v.Accel != KVM {
		return v, nil
	}
	if o.opts.Ready == nil {
		return Verdict{Accel: TCG, Reason: "KVM cannot be tried out: nothing can tell whether a guest is up"}, nil
	}
	return o.probed(ctx, spec)
}

// hostKVM says whether the device may be used at all by a machine of user uid;
// that a guest runs on it only a probe can say.
func hostKVM(device string, uid int) Verdict {
	no := func(reason, next string) Verdict { return Verdict{Accel: TCG, Reason: reason, Next: next} }
	if runtime.GOARCH != "amd64" {
		return no("the host is not x86-64", "")
	}
	st, err := os.Stat(device)
	if errors.Is(err, fs.ErrNotExist) {
		return no("there is no "+device, "Load the module kvm_intel or kvm_amd; in a virtual machine, nested virtualization must be on.")
	}
	if err != nil {
		return no(fmt.Sprintf("look at %s: %v", device, err), "")
	}
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrPermission) {
		return no("no permission to open "+device, "Add the daemon's user to the group kvm (usermod -aG kvm USER), log in again, and restart the daemon.")
	}
	if err != nil {
		return no(fmt.Sprintf("open %s: %v", device, errors.Unwrap(err)), "See the kernel log for why KVM is switched off (often in the firmware's settings).")
	}
	defer f.Close()
	const getAPIVersion, stable = 0xae00, 12 // KVM_GET_API_VERSION, Documentation/virt/kvm/api.rst
	if v, err := unix.IoctlRetInt(int(f.Fd()), getAPIVersion); err != nil || v != stable {
		return no(fmt.Sprintf("%s does not speak KVM's interface (version %d, %v)", device, v, err), "")
	}
	if uid != 0 && !mayOpen(st, uid) {
		return no(fmt.Sprintf("%s (mode %04o) is not open to the machines' users", device, st.Mode().Perm()),
			"Give it to the group kvm with mode 0660, as Debian's and Ubuntu's udev rules do.")
	}
	return Verdict{Accel: KVM, Reason: device + " answers"}
}

// kvmGroups are the supplementary groups that let another user open device: the
// device's, unless that is root's.
func kvmGroups(device string) []uint32 {
	st, err := os.Stat(device)
	if err != nil {
		return nil
	}
	sys := st.Sys().(*syscall.Stat_t)
	if st.Mode().Perm()&0o006 == 0o006 || st.Mode().Perm()&0o060 != 0o060 || sys.Gid == 0 {
		return nil
	}
	return []uint32{sys.Gid}
}

// mayOpen reports whether user uid, given the device's group, may open it.
func mayOpen(st fs.FileInfo, uid int) bool {
	sys := st.Sys().(*syscall.Stat_t)
	perm := st.Mode().Perm()
	return perm&0o006 == 0o006 ||
		perm&0o060 == 0o060 && sys.Gid != 0 ||
		perm&0o600 == 0o600 && int(sys.Uid) == uid
}

// kernelKey names a kernel in verdicts: by digest or, for a file that the user
// has pointed to, by what the file system tells of it.
func kernelKey(k domain.Kernel) (string, error) {
	if k.Digest != "" {
		return k.Digest, nil
	}
	st, err := os.Stat(k.Path)
	if err != nil {
		return "", fault.New(fault.Missing, "look at kernel: %w", err).WithNext("Check the path of the kernel.")
	}
	return strings.Join([]string{k.Path, fmt.Sprint(st.Size()), fmt.Sprint(st.ModTime().UnixNano())}, " "), nil
}
