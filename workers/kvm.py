"""The KVM accelerator, in its first form."""
# mypy: ignore-errors
# ruff: noqa
from __future__ import annotations
import ctypes, mmap, os, struct, errno
from dataclasses import dataclass
from ipc.messages import ExitReason
from .accel import AccelError, Exit, ExitKind
from .ports import UnknownPort
libc=ctypes.CDLL(None,use_errno=True)
_ioctl=libc.ioctl; _ioctl.argtypes=[ctypes.c_int,ctypes.c_ulong,ctypes.c_void_p]
def ioctl(fd,nr,arg=None):
    r=_ioctl(fd,nr,arg)
    if r<0:
        e=ctypes.get_errno(); raise OSError(e,os.strerror(e))
    return r
def iob(fd,nr,buf):
    c=(ctypes.c_char*len(buf)).from_buffer(buf); return ioctl(fd,nr,ctypes.addressof(c))
@dataclass
class KvmInfo:
    present: bool=True; permitted: bool=True; ring_capability: str|None='ACQ_REL'; max_entries: int=65536; reason: str=''
def probe():
    if not os.path.exists('/dev/kvm'):
        return KvmInfo(False,False,None,0,'/dev/kvm is missing (no KVM in this kernel, or no virtualisation)')
    try:
        fd=os.open('/dev/kvm',os.O_RDWR|os.O_CLOEXEC)
    except OSError as x:
        return KvmInfo(True,False,None,0,f'/dev/kvm cannot be opened: {x.strerror} (add the user to group kvm)')
    try:
        for cap,name in ((223,'DIRTY_LOG_RING_ACQ_REL'),(192,'DIRTY_LOG_RING')):
            n=ioctl(fd,0xAE03,cap)
            if n: return KvmInfo(True,True,name,n//16,'')
        return KvmInfo(True,True,None,0,'')
    finally: os.close(fd)
class KvmAccelerator:
    def __init__(self, spec, memory, control, ports):
        self.spec,self.memory,self.control,self.ports=spec,memory,control,ports
        self.build()
    def build(self):
        spec=self.spec
        self.kvm=os.open('/dev/kvm',os.O_RDWR|os.O_CLOEXEC); self.vm=ioctl(self.kvm,0xAE01)
        if spec.ring_entries:
            b=bytearray(104); struct.pack_into('<IIQ',b,0,223,0,spec.ring_entries*16); iob(self.vm,0x4068AEA3,b)
        else:
            b=bytearray(104); struct.pack_into('<IIQ',b,0,168,0,1); iob(self.vm,0x4068AEA3,b)
        for s in self.memory.slots.values(): self.set_memslot(s.spec)
        self.vcpu_fd=ioctl(self.vm,0xAE41)
        cp=bytearray(8+40*200); struct.pack_into('<I',cp,0,200); iob(self.kvm,0xC008AE05,cp); iob(self.vcpu_fd,0x4008AE90,cp)
        self.kvm_run_size=ioctl(self.kvm,0xAE04); self.m=mmap.mmap(self.vcpu_fd,self.kvm_run_size)
        self.imm=ctypes.c_uint8.from_buffer(self.m,1); self.reason=ctypes.c_uint32.from_buffer(self.m,8)
        r=spec.boot
        s=bytearray(312); iob(self.vcpu_fd,0x8138AE83,s)
        def seg(base,limit,sel,type_,dpl,l,s_,g,db): return struct.pack('<QIHBBBBBBBBBB',base,limit,sel,type_,1,dpl,db,s_,l,g,0,0,0)
        cs=seg(0,0xffffffff,r['cs'],0xb,r['cpl'],1,1,1,0); ds=seg(0,0xffffffff,r['ds'],3,r['cpl'],0,1,1,1)
        tr=seg(r['tss_base'],r['tss_limit'],r['tr_selector'],0xb,0,0,0,0,0)
        out=cs+ds*5+tr+s[7*24:8*24]+struct.pack('<QH6xQH6x',r['gdt_base'],r['gdt_limit'],r['idt_base'],r['idt_limit'])
        out+=struct.pack('<QQQQQQQ',r['cr0'],0,r['cr3'],r['cr4'],0,r['efer'],struct.unpack_from('<Q',s,8*24+32+48)[0])
        s[:len(out)]=out; iob(self.vcpu_fd,0x4138AE84,s)
        self.order="rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
        iob(self.vcpu_fd,0x4090AE82,bytearray(struct.pack('<18Q',*[r.get(k,0) for k in self.order])))
    def clear_immediate_exit(self): self.imm.value=0
    def interrupt(self): self.imm.value=1
    def registers(self):
        b=bytearray(144); iob(self.vcpu_fd,0x8090AE81,b); return dict(zip(self.order,struct.unpack('<18Q',b)))
    def setregs(self,r): iob(self.vcpu_fd,0x4090AE82,bytearray(struct.pack('<18Q',*[r[k] for k in self.order])))
    def hypercall_args(self):
        r=self.registers(); return r['rax']&0xffffffff,r['rdi'],r['rsi']
    def set_hypercall_result(self,v):
        self.imm.value=1; _ioctl(self.vcpu_fd,0xAE80,None); self.imm.value=0
        r=self.registers(); r['rax']=v; self.setregs(r)
    def run(self):
        while True:
            if _ioctl(self.vcpu_fd,0xAE80,None)<0:
                e=ctypes.get_errno()
                if e==errno.EINTR: return Exit(ExitKind.KICKED)
                raise OSError(e,'run')
            n=self.reason.value
            if n==31: return Exit(ExitKind.RING_FULL)
            if n==2:
                d,sz,port,cnt,off=struct.unpack_from('<BBHIQ',self.m,32)
                try:
                    if d:
                        ev=self.ports.write(port,sz,int.from_bytes(self.m[off:off+sz],'little'))
                        if ev: return Exit(ExitKind.PORT,event=ev)
                    else: self.m[off:off+sz]=self.ports.read(port,sz).to_bytes(sz,'little')
                except UnknownPort as x: return Exit(ExitKind.END,reason=ExitReason.UNKNOWN_PORT,detail=str(x),registers=self.registers())
                continue
            if n==6: return Exit(ExitKind.END,reason=ExitReason.BAD_ADDRESS,registers=self.registers())
            return Exit(ExitKind.END,reason=ExitReason.INTERNAL_ERROR,detail=f'exit {n}',registers=self.registers())
    def reset_ring(self,expected):
        t=0
        while t<expected:
            n=ioctl(self.vm,0xAEC7)
            if not n: break
            t+=n
        return t
    def set_memslot(self,s):
        b=bytearray(struct.pack('<IIQQQ',s.id,1 if s.log else 0,s.gpa,s.size,self.memory.slots[s.id].host_address)); iob(self.vm,0x4020AE46,b)
    def remove_memslot(self,i):
        s=self.memory.slots[i].spec
        b=bytearray(struct.pack('<IIQQQ',i,0,s.gpa,0,0)); iob(self.vm,0x4020AE46,b)
    def get_dirty_log(self,i):
        a=self.memory.slots[i].log_address; iob(self.vm,0x4010AE42,bytearray(struct.pack('<IIQ',i,0,a)))
        n=-(-self.memory.slots[i].spec.size//4096//64)*8
        return int.from_bytes(ctypes.string_at(a,n),'little').bit_count()
    def clear_dirty_log(self,i):
        p=self.memory.slots[i].spec.size//4096
        iob(self.vm,0xC018AEC0,bytearray(struct.pack('<IIQQ',i,p,0,self.memory.slots[i].log_address)))
    def rebuild_ring(self):
        r=bytearray(144); iob(self.vcpu_fd,0x8090AE81,r); s=bytearray(312); iob(self.vcpu_fd,0x8138AE83,s)
        f=bytearray(416); iob(self.vcpu_fd,0x81A0AE8C,f)
        self.close(); self.build()
        iob(self.vcpu_fd,0x4138AE84,s); iob(self.vcpu_fd,0x4090AE82,r); iob(self.vcpu_fd,0x41A0AE8D,f)
    def get_state(self): return {}
    def set_state(self,s): pass
    def close(self):
        for fd in (self.vcpu_fd,self.vm,self.kvm): os.close(fd)
